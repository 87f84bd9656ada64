"""The resolver that imports no torch: equal to the typed parser where it knows, and never stricter."""

import contextlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reslab.check import check, resolved
from reslab.config import AUTOMATIC, Experiment
from reslab.errors import UserError
from reslab.keys import all_keys
from reslab.resolve import with_defaults
from reslab.signatures import Unknown
from runner import reslab
from test_configs import CONFIGS, EXPERIMENTS, OVERLAYS

STACKED = [path for path in OVERLAYS if "timm" not in path.read_text(encoding="utf-8")]
SPELLINGS = {  # of a key, each with values that its type accepts
    ("lr", "model.optimizer.lr", "model.optimizer.init_args.lr"): st.sampled_from(["0.1", "1e-3", "1", ".5"]),
    ("epochs", "trainer.max_epochs"): st.sampled_from(["1", "200", "-1", "null"]),
    ("batch_size", "data.batch_size"): st.sampled_from(["1", "64", "1024"]),
    ("seed", "seed_everything"): st.integers(0, 2**32 - 1).map(str),
    ("devices", "trainer.devices"): st.sampled_from(["1", "4", "auto", "[0, 1]", "-1"]),
    ("precision", "trainer.precision"): st.sampled_from(["32-true", "bf16-mixed", "auto"]),
    ("model.net",): st.sampled_from(["resnet18", "resnet20", "net/resnet8", "ResNet", "wide_resnet50_2"]),
    ("data.dataset",): st.sampled_from(["cifar10", "cifar100", "digits", "reslab.data.Digits"]),
    ("model.objective",): st.sampled_from(["cross_entropy", "binary_cross_entropy", "CrossEntropy"]),
    ("model.optimizer",): st.sampled_from(["AdamW", "torch.optim.SGD"]),
    ("model.schedule",): st.sampled_from(["Cosine", "Linear", "reslab.training.OneCycle", "null"]),
    ("model.net.init_args.norm", "model.net.norm"): st.sampled_from(["batch", "group"]),
    ("model.optimizer.weight_decay",): st.sampled_from(["0", "5e-4", "0.05"]),
    ("model.ema_decay",): st.sampled_from(["0.99", "null"]),
    ("model.weights", "run.group", "data.root"): st.sampled_from(["null", "some/where", "3", "1e3", "true", "a: b"]),
    ("model.param_groups.freeze",): st.sampled_from(["[stem]", "[]"]),
    ("data.val_split",): st.sampled_from(["0", "0.1", "500"]),
    ("data.augment.flip",): st.sampled_from(["none", "random"]),
    ("data.augment.scale",): st.sampled_from(["[0.2, 1]", "[0.35, 1.0]"]),
    ("data.classes", "run.tags"): st.sampled_from(["[a, b]", '["1", "2"]']),
    ("run.name",): st.sampled_from(["mine", "3", "1e-3", "true"]),
    ("run.seeds.order",): st.sampled_from(["0", "7", "null"]),
    ("trainer.deterministic", "trainer.benchmark"): st.sampled_from(["true", "false", "null"]),
    ("trainer.callbacks", "trainer.callbacks+"): st.sampled_from(
        ["[{class_path: LearningRateMonitor, init_args: {logging_interval: step}}]", "[]"]
    ),
    ("trainer.limit_train_batches",): st.sampled_from(["3", "0.5", "null"]),
}


def assert_equal(typed: Any, known: Any, key: str = "") -> None:
    """Compare a value of the typed parser with the resolver's, as far as the resolver knows it."""
    if isinstance(known, Unknown) or key.startswith(".trainer.strategy.init_args"):
        return
    if key == ".trainer.precision" and known == "auto":  # the typed parser looks at the machine
        assert typed in AUTOMATIC.values()
        return
    if key == ".trainer.devices":  # the typed parser keeps numbers as text
        typed, known = str(typed), str(known)
    if isinstance(typed, dict) and isinstance(known, dict):
        for name in {*typed, *known} if "class_path" not in typed else {*typed}:
            if typed.get(name) or known.get(name):
                assert_equal(typed.get(name), known.get(name), f"{key}.{name}")
    elif isinstance(typed, list) and isinstance(known, list):
        assert len(typed) == len(known), (key, typed, known)
        for pair in zip(typed, known, strict=True):
            assert_equal(*pair, key)
    elif key.endswith(".class_path"):
        assert typed.rpartition(".")[2] == known.rpartition(".")[2], key
    else:
        assert typed == known and isinstance(typed, str) == isinstance(known, str), (key, typed, known)


def compare(args: list[str]) -> bool:
    """Compare the results of both; return False if the typed parser refuses the arguments."""
    try:
        typed = yaml.safe_load(Experiment(args).dump())
    except UserError:
        return False
    check([*args, "--print_config"])
    known = with_defaults(resolved(args))
    known["run"]["dir"] = None
    assert_equal(typed, known)
    return True


def arguments(draw: st.DrawFn) -> list[str]:
    """Return a random command line: an experiment by name or path, overlays, and overrides in any spelling."""
    experiment = draw(st.sampled_from(EXPERIMENTS))
    args = [draw(st.sampled_from([experiment.stem, str(experiment)]))]
    for path in draw(st.lists(st.sampled_from(STACKED), max_size=2, unique=True)):
        args += ["--config", draw(st.sampled_from([f"{path.parent.name}/{path.stem}", str(path)]))]
    for keys in draw(st.lists(st.sampled_from([*SPELLINGS]), max_size=5, unique=True)):
        key, value = draw(st.sampled_from(keys)), draw(SPELLINGS[keys])
        args += draw(st.sampled_from([[f"--{key}", value], [f"--{key}={value}"]]))
    return args


ANY = settings(deadline=None, suppress_health_check=[*HealthCheck], derandomize=True)


@given(st.composite(arguments)())
@settings(ANY, max_examples=25)
def test_resolver_and_typed_parser_agree(args: list[str]) -> None:
    compare(args)


@pytest.mark.slow
@given(st.composite(arguments)())
@settings(ANY, max_examples=400)
def test_resolver_and_typed_parser_agree_on_many_command_lines(args: list[str]) -> None:
    compare(args)


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_resolver_and_typed_parser_agree_on_every_experiment(path: Path) -> None:
    compare([path.stem])


def test_print_config_is_what_the_resolver_says() -> None:
    args = ["cifar10_resnet18", "--config", "ema", "--lr", "0.3", "--model.net", "resnet20"]
    status, output = reslab("fit", *args, "--print_config")
    assert status == 0
    assert_equal(yaml.safe_load(output), with_defaults(resolved(args)))


VALUES = [
    "0", "-1", "1", "3", "2.5", "1e3", "1e-3", "nan", ".inf", "true", "yes", "null", "none", "~", "", "auto", "many",
    "[1]", "[a]", "[]", "[1, 2]", "{}", "{a: 1}", "2026-01-01", "0x10", "1_000", "12:30", "'1'", "SGD", "Cosine",
]  # fmt: skip
KEYS = [row.key for row in all_keys() if not row.of or row.of in ("ResNet", "SGD", "OneCycle", "CrossEntropy")]


def is_stricter(key: str, value: str) -> bool:
    """Return whether the check refuses a value with which the typed parser builds data and model."""
    args = ["digits", f"--{key}={value}"]
    try:
        check(args)
    except UserError:
        with contextlib.suppress(UserError):
            _, model, _ = Experiment(args).build()
            with contextlib.suppress(ValueError):  # the optimizer is built later
                model.make_optimizer(model.net.parameters())
                return True
    return False


@pytest.mark.parametrize("text", ["~", "null", "Null", "NULL", "nULL", " ~ ", "", " ", "#a", "'~'", "~x", "a: b: c"])
def test_resolver_and_typed_parser_agree_on_null(text: str) -> None:
    keys = ["model.weights", "data.root", "run.group"]
    assert compare(["digits", *(f"--{key}={text}" for key in keys)])


@given(st.sampled_from(KEYS), st.sampled_from(VALUES))
@settings(ANY, max_examples=40)
def test_check_refuses_nothing_that_the_typed_parser_accepts(key: str, value: str) -> None:
    assert not is_stricter(key, value)


@pytest.mark.slow
@given(st.sampled_from(KEYS), st.sampled_from(VALUES))
@settings(ANY, max_examples=2000)
def test_check_is_never_stricter_than_the_typed_parser(key: str, value: str) -> None:
    assert not is_stricter(key, value)


def test_shipped_configs_pass_the_check_in_a_process_without_torch() -> None:
    lines = [[path.stem] for path in EXPERIMENTS]
    lines += [["digits", "--config", f"{path.parent.name}/{path.stem}"] for path in OVERLAYS]
    for kind, key in (("net", "model.net"), ("data", "data.dataset"), ("objective", "model.objective")):
        lines += [["digits", f"--{key}", path.stem] for path in (CONFIGS / kind).glob("*.yaml")]
    lines += [["digits", "--model.net.help", "ResNet"], ["digits", "--model.net.class_path=reslab.user_code.TinyNet"]]
    lines += [["digits", "--trainer.strategy.class_path", "DDPStrategy", "--trainer.strategy.bucket_cap_mb", "25"]]
    code = (
        "import sys; from reslab.check import check\n"
        f"for line in {lines!r}: check(line)\n"
        "assert not {'torch', 'lightning'} & {*sys.modules}"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
