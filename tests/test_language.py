"""Plain English in all tracked files: no idioms that must be read twice, and no names that were replaced."""

import ast
import re
import subprocess
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = {"", ".cfg", ".cff", ".css", ".ini", ".ipynb", ".j2", ".md", ".py", ".sbatch", ".toml", ".txt", ".yaml", ".yml"}
UNITS = "step|epoch|run|arm|cell|seed|batch|image|rank|process|worker|file|line|curve|class|machine|node|GPU|second"
VERBS = r"(?! (has|is|was|had|does|can|will|may|must|that|which|whose|ends?|starts?|stops?|fails?|needs?)\b)"
# What to write instead, and the idioms. UNITS and VERBS are replaced by those above; a space also matches a line break.
IDIOMS = r"""
one X per Y -- \ban? [a-z]+ (a|an|a logged) (UNITS)\bVERBS
Xs per Y -- \b(UNITS)e?s an? (UNITS)\bVERBS
N s per Y -- \b\d[\d.,]* ?(ms|s|MB|GB|min|h|points|images) an? (UNITS)\b
once per Y -- \bonce an? (UNITS)\bVERBS
reported, predicted -- \b(is|are|was|were|it|they) answered\b
name what is reported -- \b(says? nothing|say so|says so|says it|without a word|not a word|(last|own|run's) word)\b
given in -- \bstands? in:
resume, continue -- \b(goes|go|going|went) on\b(?! to)
does not train -- \btrains? nothing\b
downloads what it can -- \bwhat can be fetched\b
is not affected -- \b(will|would|does|do) not mind\b
separate -- \bof (its|their|his|her) own\b
run directory -- \bthe run's (own|folder)\b|\bfolder of a run\b
use the same run directory -- \bmeans? the same (folder|directory)\b
distinguish -- \b(be|can be|to be) told (from|apart)\b
sharded models, replicas -- \bdivided nets?\b|\bcopies of the net\b
functions of training progress -- \blaws? of (training|progress)\b
no checkpoint is selected -- \bchosen by nothing\b
concurrent runs -- \bcells at a time\b
scale with trainer.max_epochs -- \b(never|nowhere) typed\b|\btyped nowhere\b
higher or lower is better -- \b(more|less) is better\b
not adjusted -- \beach for itself\b
omit it -- \ball the same\b|\bas ever\b|\bat hand\b|\b(is|are) dear\b|\bno more than (they|it) must\b|\bas they come\b
be literal -- \b(in silence|without end|to the last bit|whole or not at all|in force)\b|\bto the test\b
name it -- \bwhat comes of\b|\bwhat of\b|\bthat it cannot build\b
if it -- (^|[.:;,] )should (it|they|he|one|the [a-z]+)\b(?! be| not)
about N -- \bsome (\d+|ten|twenty|thirty|fifty|five)\b
modern words -- \bNor (is|are|does|do|can|will)\b|\b(lest|thereof|therein|wherein|albeit|hence|anew|thereby)\b
is not -- \b(is|are) no (part of|key|arm|module|submodule|file of)\b
no ellipsis between clauses -- [a-z] … [a-z]
"""
RULES = [tuple(line.split(" -- ")) for line in IDIOMS.strip().splitlines()]
REPLACED = (  # names in code
    "Parts Watch take_last_word blame TrustedIO is_whole mend Lockstep agreed LateLoader Slots MADE_AHEAD upright View "
    "Room Board foreign strays Progressive law Descent become farewell Parting known_failure knobs "
    "_what_decides_about_bits"
)
KEYS = r"\b(lr_reference_batch|flip_test|data\.view|run\.rule|run\.elastic)\b"
VAGUE = "said told found given seen asked wanted own"  # names of variables: name the thing instead


@cache
def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    paths = [ROOT / name for name in listed.split("\0") if name]
    skipped = {"LICENSE", "constraints.txt", Path(__file__).name}
    return [p for p in paths if p.suffix in TEXT and p.name not in skipped and p.is_file() and not p.is_symlink()]


@cache
def text(path: Path) -> str:
    """Return a file's text without indentation and comment marks."""
    return re.sub(r"[ \t]*\n[ \t]*(?:[#>] ?)?", "\n", path.read_text(encoding="utf-8"))


def hits(pattern: str, paths: list[Path]) -> list[str]:
    """Return FILE:LINE: TEXT of every match."""
    pattern = pattern.replace("UNITS", UNITS).replace("VERBS", VERBS).replace(" ", r"[ \n]")
    regex = re.compile(pattern, re.MULTILINE | re.IGNORECASE)
    return [
        f"{path.relative_to(ROOT)}:{text(path).count(chr(10), 0, match.start()) + 1}: {' '.join(match[0].split())}"
        for path in paths
        for match in regex.finditer(text(path))
    ]


pytestmark = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")


@pytest.mark.parametrize(("instead", "idiom"), RULES)
def test_text_is_plain_english(instead: str, idiom: str) -> None:
    idioms = hits(idiom, tracked())
    assert not idioms, f"instead write: {instead}\n" + "\n".join(idioms)


def test_replaced_config_keys_are_gone() -> None:
    assert not hits(KEYS, tracked())


@cache
def defined_names() -> list[tuple[str, str]]:
    """Return every name that code defines or assigns, as (name, FILE:LINE)."""
    names = []
    for path in tracked():
        for node in ast.walk(ast.parse(path.read_bytes())) if path.suffix == ".py" else ():
            if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
                name = node.id if isinstance(node, ast.Name) else node.attr
            elif isinstance(node, ast.arg):
                name = node.arg
            elif isinstance(node, ast.FunctionDef | ast.ClassDef):
                name = node.name
            else:
                continue
            names.append((name, f"{path.relative_to(ROOT)}:{node.lineno}"))
    return names


@pytest.mark.parametrize(("kind", "banned"), [("replaced", REPLACED), ("vague", VAGUE)])
def test_code_has_clear_names(kind: str, banned: str) -> None:
    used = [f"{place}: {name}" for name, place in defined_names() if name in banned.split()]
    assert not used, f"{kind} names:\n" + "\n".join(used)


BAD = """
metrics.csv has a row a logged step
351 steps an epoch, or 3 ms a step
tested once a run.
a wrong key is answered in one message
manifest.json has the run's own word
the run goes on from there
fetches what can be fetched and trains nothing
all processes mean the same folder
a stream of its own
works as ever
some 10 s
Should it fail, run it again.
stands in: the command line
the weights are the last, chosen by nothing
so many copies of the net, each divided
one is killed … the next one resumes
It says nothing about it.
"""
GOOD = """
one row per step
it goes on to the next look
a class of your own
--config … --config ddp
3, 4, … 10
What should it be?
Once a run has ended, it is complete.
"""


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [*((line, True) for line in BAD.strip().splitlines()), *((line, False) for line in GOOD.strip().splitlines())],
)
def test_idioms_are_detected(sentence: str, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    monkeypatch.setattr("test_language.ROOT", tmp_path)
    for written in (sentence, sentence.replace(" ", "\n# ")):  # also over the line breaks of a comment
        page.write_text(written, encoding="utf-8")
        text.cache_clear()
        assert any(hits(idiom, [page]) for _, idiom in RULES) is expected
