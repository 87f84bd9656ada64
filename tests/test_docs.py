"""The code blocks of the README, the quickstart, the tutorials and the how-to pages work.

Blocks run from top to bottom, in a copy of the repository. Blocks of python and yaml whose first line is a comment with
a path are written there. A text block is the expected output of the block before it: its lines must occur in this
order, with any numbers; `...` matches anything. A comment before a block changes that:

    <!-- test: skip: REASON -->  do not run it; its commands are parsed, and their keys and files must exist
    <!-- test: status 2 -->      it ends with this exit status
    <!-- test: full -->          run it as it is, without the config SHORT stacked on its runs
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from reslab import cli
from warm import Warm

REPO = Path(__file__).resolve().parents[1]
FOLDERS = ("tutorials", "how_to")
PAGES = ["README.md", "docs/quickstart.md"]
PAGES += sorted(str(path.relative_to(REPO)) for folder in FOLDERS for path in (REPO / "docs" / folder).glob("*.md"))
BLOCK = re.compile(
    r"(?:^[ ]*<!-- test: (?P<directive>.*?) -->\n+)?"
    r"^(?P<indent>[ ]*)```(?P<language>\w*)\n(?P<text>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)
SHORT = {
    "trainer": {"max_epochs": 2, "max_steps": -1, "limit_train_batches": 2, "limit_val_batches": 1,
                "limit_test_batches": 1, "check_val_every_n_epoch": 1, "log_every_n_steps": 1},
    "data": {"batch_size": 16, "num_workers": 0},
}  # fmt: skip
OTHER_PROGRAMS = {"git", "cd", "python3", ".", "pip", "uv", "wandb", "squeue", "scancel", "export"}  # of skipped blocks
LANGUAGES = {"bash", "python", "yaml", "text", "bibtex"}


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    line: int
    language: str
    text: str
    directive: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def file(self) -> str | None:
        """The file to write the block to."""
        match = re.match(r"# ([\w./-]+\.(?:py|yaml))\n", self.text)
        return match[1] if match and self.language in ("python", "yaml") else None

    @property
    def skipped(self) -> bool:
        return self.directive.startswith("skip: ")

    @property
    def status(self) -> int:
        return int(self.directive.split()[1]) if self.directive.startswith("status ") else 0

    @property
    def commands(self) -> list[list[str]]:
        """The commands of a bash block, without comments and redirections."""
        lines = re.sub(r"\$\w+", "0", re.sub(r"\\\n\s*", "", self.text)).splitlines()  # variables are numbers
        commands: list[list[str]] = []
        for line in lines:
            command: list[str] = []
            lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
            lexer.whitespace_split = True
            for word in [*lexer, ";"]:
                if set(word) <= set("|&;"):
                    commands += [command] if command else []
                    command = []
                else:
                    command.append(word)
        return commands


def blocks(page: str) -> list[Block]:
    text = (REPO / page).read_text(encoding="utf-8")
    return [
        Block(page, text.count("\n", 0, match.start("language")) + 1, match["language"],
              re.sub(rf"^{match['indent']}", "", match["text"], flags=re.MULTILINE), match["directive"] or "")
        for match in BLOCK.finditer(text)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def cifar(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The directory of CIFAR-10 (an imitation if there are no real data), and code that makes torchvision accept it."""
    try:
        return request.getfixturevalue("shared_data") / "cifar-10-batches-py", ""
    except pytest.skip.Exception:
        folder = tmp_path_factory.mktemp("imitation")
        imitate_cifar(folder)
        return folder, "import torchvision.datasets.cifar as c; c.check_integrity = lambda *args: True"


def imitate_cifar(folder: Path) -> None:
    import pickle

    import numpy as np

    rng = np.random.default_rng(0)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        images = rng.integers(0, 256, (1000, 3072), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": images, "labels": [i % 10 for i in range(1000)]}))
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))


def imitate_pretrained(home: Path) -> None:
    """Fill a cache of torch.hub with untrained weights in place of the pretrained ones of ResNet-18."""
    import torch
    from torchvision.models import ResNet18_Weights, resnet18

    (home / "hub/checkpoints").mkdir(parents=True)
    torch.save(resnet18().state_dict(), home / "hub/checkpoints" / Path(ResNet18_Weights.DEFAULT.url).name)


@dataclass(frozen=True)
class Checkout:
    """A copy of the repository, and the environment of commands in it."""

    path: Path
    environ: dict[str, str]

    def renew(self, cifar: Path) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        self.path.mkdir()
        for name in ("src", "configs", "scripts", "weights", "hubconf.py", "pyproject.toml", "Makefile"):
            if (REPO / name).is_dir():
                shutil.copytree(REPO / name, self.path / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(REPO / name, self.path / name)
        self._add_data(cifar)

    def _add_data(self, cifar: Path) -> None:
        """Create the data of a reader: CIFAR-10, and noise in place of sketches and new images."""
        import numpy as np
        from PIL import Image

        rng = np.random.default_rng(0)
        (self.path / "data").mkdir()
        (self.path / "my_images").mkdir()
        (self.path / "data/cifar-10-batches-py").symlink_to(cifar)
        for split in ("train", "test"):
            images = rng.integers(0, 256, (64, 28, 28, 1), dtype=np.uint8)
            np.savez(self.path / f"data/sketches-{split}.npz", images=images, labels=np.arange(64) % 2)
        for i in range(3):
            Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(self.path / f"my_images/{i}.jpg")

    def bash(self, script: str, **environ: str) -> tuple[int, str]:
        command = ["bash", "-e", "-o", "pipefail", "-c", script]
        environment = {**self.environ, **environ}
        done = subprocess.run(
            command, cwd=self.path, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        return done.returncode, done.stdout


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    folder = tmp_path_factory.mktemp("docs")
    outside = {
        name: value for name, value in os.environ.items() if not name.startswith(("RESLAB_", "WANDB_", "PYTEST"))
    }
    environ = {
        **outside, "PATH": f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(folder / "repo/src"), "TORCH_HOME": str(folder / "torch_home"), "WANDB_MODE": "offline",
        "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "COLUMNS": "120",
    }  # fmt: skip
    return Checkout(folder / "repo", environ)


@pytest.fixture
def checkout(copy: Checkout, cifar: tuple[Path, str]) -> Checkout:
    copy.renew(cifar[0])
    return copy


@pytest.fixture(scope="module")
def server(copy: Checkout, cifar: tuple[Path, str]) -> Iterator[None]:
    copy.renew(cifar[0])
    folder = copy.path.parent
    imitate_pretrained(folder / "torch_home")
    (folder / "short.yaml").write_text(yaml.safe_dump(SHORT))
    warm = Warm(folder / "bin", copy.environ, cifar[1])
    yield
    warm.close()


# Every page


@pytest.mark.parametrize("page", PAGES)
def test_blocks_are_of_a_known_kind(page: str) -> None:
    for block in blocks(page):
        assert block.language in LANGUAGES, f"{block}: unknown language {block.language!r}"
        assert re.fullmatch(r"|skip: .+|status \d+|full", block.directive), f"{block}: {block.directive}"
        if block.language == "yaml":
            assert block.file or block.skipped, f"{block}: the first line is a comment that names the file"
    text = (REPO / page).read_text(encoding="utf-8")
    assert len(blocks(page)) * 2 == len(re.findall(r"^ *```", text, re.MULTILINE)), "a block is not found"
    assert text.count("<!-- test:") == sum(bool(block.directive) for block in blocks(page)), "a comment has no block"


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page: str) -> None:
    text = BLOCK.sub("", (REPO / page).read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if not target.startswith(("http:", "https:", "../../actions/")):  # actions: on GitHub
            assert ((REPO / page).parent / target).exists(), f"{page}: {target} does not exist"


def test_readme_is_short() -> None:
    assert (REPO / "README.md").stat().st_size <= 10_000


def test_images_are_small() -> None:
    assert all(image.stat().st_size < 150_000 for image in (REPO / "docs/images").iterdir())


@pytest.mark.parametrize("page", PAGES)
def test_commands_name_existing_keys_and_files(page: str, checkout: Checkout) -> None:
    configs: list[tuple[str, list[str]]] = []
    for block in blocks(page):
        if block.file:
            write(block, checkout)
        if block.language == "bash" and not block.status:
            configs += [(str(block), words) for command in block.commands if (words := config_of(block, command))]
    status, output = checkout.bash(checking(configs))
    assert status == 0, output


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_blocks_run(page: str, server: None, checkout: Checkout) -> None:
    output: str | None = None
    for block in blocks(page):
        if block.language == "text":
            if output is not None and not block.skipped:
                assert_shown(block, output)
        elif block.file:
            write(block, checkout)
        elif block.language in ("bash", "python"):
            output = None if block.skipped else run(block, checkout)


def write(block: Block, checkout: Checkout) -> None:
    path = checkout.path / str(block.file)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(block.text, encoding="utf-8")


CHECK = """
import json, sys
from reslab.check import check
from reslab.errors import UserError

failed = []
for place, words in json.loads(sys.argv[1]):
    try:
        check(words)
    except UserError as error:
        failed.append(f"{place}: {' '.join(words)}: {error}")
print(*failed, sep="\\n")
sys.exit(bool(failed))
"""


def checking(configs: list[tuple[str, list[str]]]) -> str:
    """Return the command that checks configs, each with its place."""
    return shlex.join([sys.executable, "-c", CHECK, json.dumps(configs)])


def config_of(block: Block, command: list[str]) -> list[str]:
    """Return the arguments of a command that describe a config; check what else is in it."""
    program, *words = command
    if program == "make":
        assert re.search(rf"^{words[0]}:", (REPO / "Makefile").read_text(), re.MULTILINE), f"{block}: make {words[0]}"
    elif program == "torchrun":
        return config_of(block, words[words.index("-m") + 1 :])
    elif program == "sbatch":
        return words[words.index("scripts/slurm.sbatch") + 1 :]
    elif program == "reslab" and words[0] == "fit":
        return [] if "--help" in words else words[1:]
    elif program == "reslab":
        args, overrides = cli._parser().parse_known_args(words)
        assert args.takes_config or not overrides, f"{block}: {overrides}"
        return overrides if words[0] in ("doctor", "preview") else []
    else:
        assert program in OTHER_PROGRAMS or not block.skipped, f"{block}: {program}"
    return []


def run(block: Block, checkout: Checkout) -> str:
    script = block.text
    if block.language == "python":
        (checkout.path / "block.py").write_text(block.text, encoding="utf-8")
        script = "python block.py"
    short = {} if block.directive == "full" else {"SHORTEN": str(checkout.path.parent / "short.yaml")}
    status, output = checkout.bash(script, **short)
    assert status == block.status, f"{block}: exit status {status}\n{script}\n{output}"
    return output


def assert_shown(block: Block, output: str) -> None:
    """Check that the lines of the block occur in the output in this order."""
    actual = iter(loose(line) for line in output.splitlines())
    for line in block.text.splitlines():
        if line.strip(" ."):
            pattern = ".*".join(map(re.escape, loose(line).split("...")))
            assert any(re.fullmatch(pattern, other) for other in actual), f"{block}: no line {line!r} in\n{output}"


def loose(line: str) -> str:
    """Return a line with every number replaced by 0, and single spaces."""
    return " ".join(re.sub(r"[−+-]?\b\d[\d,.:]*(e[+-]?\d+)?\b", "0", line).split())


# The test itself


@pytest.mark.parametrize(
    "command",
    ["reslab fit digits --trainer.max_epoch 3", "reslab fit no_such_experiment",
     "torchrun --nnodes 2 -m reslab fit digits --lr high",
     "sbatch --nodes=2 scripts/slurm.sbatch digits --config no_such_recipe"],
)  # fmt: skip
def test_invalid_command_is_found(command: str, checkout: Checkout) -> None:
    block = Block("page.md", 1, "bash", f"{command}   # a comment\n", "skip: needs a GPU")
    [words] = block.commands
    status, output = checkout.bash(checking([("page.md:1", config_of(block, words))]))
    assert status == 1 and "page.md:1" in output


def test_output_is_compared_without_numbers() -> None:
    output = "epoch 1/3  train/loss 2.20  left 0:03\nother\ntest/acc  99.72 % (n = 359)\n"
    assert_shown(
        Block("page.md", 1, "text", "epoch 1/3 train/loss 1.79 ...\n...\ntest/acc 98.5 % (n = 10)\n", ""), output
    )
    for missing in ("epoch 1/3 val/loss 2", "test/acc 98 %\nepoch 1/3 ..."):
        with pytest.raises(AssertionError, match="no line"):
            assert_shown(Block("page.md", 1, "text", missing, ""), output)
