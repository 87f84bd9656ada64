"""Export a run's network to ONNX, a PyTorch 2 program or safetensors, and check the file before it appears."""

import importlib.util
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

import reslab
from reslab.data import ImageData
from reslab.data.augment import normalize
from reslab.data.datasets import DataError
from reslab.errors import UserError
from reslab.files import check_output, replacing, sha256_file, write_text
from reslab.inference import load_run
from reslab.runs import manifest as manifests
from reslab.runs.folder import RunFolder

NUM_CHECK_IMAGES = 16
TOLERANCE = 1e-4  # relative to the largest absolute logit
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


class Normalized(nn.Module):
    """A network preceded by normalization: uint8 images (N, C, H, W) in [0, 255] to logits (N, num_classes)."""

    def __init__(self, net: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.net = net
        self.mean, self.std = (nn.Buffer(255 * torch.tensor(values)[:, None, None]) for values in (mean, std))

    def forward(self, images: Tensor) -> Tensor:
        return self.net((images.float() - self.mean) / self.std)


def export(run: str, format: str, out: Path | None, with_normalization: bool, overrides: list[str]) -> None:
    """Write the network with the weights that the run tested, and a description for its users in FILE.json.

    The file is read back and compared with the network on test images (or on noise if the test data are missing);
    it appears only if the outputs agree. Exports are float32 and accept any batch size.

    Args:
        run: Run directory; `overrides` change its config.
        format: onnx (for onnxruntime and others), pt2 (torch.export.load) or safetensors (weights only).
        out: Output file; default: RUN/export/NAME.FORMAT, with the run's name.
        with_normalization: Accept decoded uint8 images instead of normalized float32 images.

    Raises:
        UserError: A package is missing, the network cannot be exported with a dynamic batch size, or the outputs
            differ by more than TOLERANCE.
    """
    if with_normalization and format == "safetensors":
        raise UserError("--with-normalization requires onnx or pt2: safetensors holds only weights (see its JSON file)")
    missing = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if format == "onnx" and missing:
        raise UserError(f"ONNX export requires {', '.join(missing)}: pip install {' '.join(missing)}")
    folder = RunFolder.existing(run)
    out = out or folder.path / "export" / f"{Path(manifests.read(folder.manifest)['name']).name}.{format}"
    check_output(out)
    record_file = out.with_name(f"{out.name}.json")
    check_output(record_file)
    data, model, _ = load_run(run, overrides)
    net = model.net.float().eval().requires_grad_(False).to(memory_format=torch.contiguous_format)
    images, source = _check_images(data)
    description = _describe(run, data, with_normalization)
    statistics = data.dataset.mean, data.dataset.std
    graph: nn.Module = net
    inputs = normalize(images, *statistics).contiguous()
    logits = net(inputs)
    if with_normalization:
        graph, inputs = Normalized(net, *statistics).eval(), images.permute(0, 3, 1, 2).contiguous()
    with replacing(out) as part:
        try:
            WRITERS[format](graph, inputs[[0, 0]], description, part)  # a batch of one would be specialized
            exported = READERS[format](net, part)
            difference = max(float((exported(inputs[:n]) - logits[:n]).abs().max()) for n in (1, len(inputs)))
        except Exception as error:  # exporters raise many types
            raise UserError(f"{format} export with a dynamic batch size failed: {_cause(error)}") from error
        largest = float(logits.abs().max())
        summary = f"max abs difference {difference:.1e}, max abs logit {largest:.3g}, {len(inputs)} {source}"
        if not difference <= TOLERANCE * largest:
            raise UserError(f"{out} not written: its outputs differ from the network's ({summary})")
    check = {"images": source, "n": len(inputs), "max_abs_difference": difference, "max_abs_logit": largest}
    record = {**description, "format": format, "sha256": sha256_file(out), "check": check}
    write_text(record_file, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB, {summary}\n{record_file}")


def _cause(error: BaseException) -> str:
    """Return the first and the last line of the root cause, without torch's debugging advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).partition("The error above occurred")[0].strip().splitlines() or [type(error).__name__]
    return " ... ".join(dict.fromkeys((lines[0].strip(), lines[-1].strip())))


def _check_images(data: ImageData) -> tuple[Tensor, str]:
    """Return a few uint8 images (N, H, W, C) and their source: evenly spaced test images, or noise without the data."""
    try:
        n = len(data.test_data)
        rows = np.linspace(0, n - 1, min(n, NUM_CHECK_IMAGES)).astype(np.int64)
        return data.test_images(rows), "test images"
    except DataError:
        shape, rng = (NUM_CHECK_IMAGES, *data.image_shape), torch.Generator().manual_seed(0)
        noise = torch.randint(256, shape, dtype=torch.uint8, generator=rng).permute(0, 2, 3, 1)
        return noise, "noise images (test data not found)"


def _describe(run: str, data: ImageData, with_normalization: bool) -> dict[str, Any]:
    """Describe the run, the inputs that the exported network expects, and its outputs."""
    manifest = manifests.read(RunFolder(run).manifest)
    source, shape = data.dataset, list(data.image_shape)
    return {
        "reslab": reslab.__version__,
        "run": {key: manifest[key] for key in ("name", "id", "seed", "weights_sha256", "results")},
        "input": {
            "name": "images",
            "dtype": "uint8" if with_normalization else "float32",
            "shape": ["batch", *shape],
            "values": "0 to 255" if with_normalization else "(x / 255 - mean) / std, x from 0 to 255",
            "mean": source.mean,
            "std": source.std,
            "resize": f"shorter side to {data.test_resize}, antialiased, then center crop {shape[1]} × {shape[2]}",
        },
        "output": {"name": "logits", "dtype": "float32", "shape": ["batch", data.num_classes]},
        "classes": data.class_names,
    }


def _metadata(description: dict[str, Any]) -> dict[str, str]:
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in description.items()}


def _write_onnx(graph: nn.Module, example: Tensor, description: dict[str, Any], path: Path) -> None:
    names: dict[str, Any] = {"input_names": ["images"], "output_names": ["logits"]}
    with warnings.catch_warnings(action="ignore"):
        program = torch.onnx.export(graph, (example,), dynamic_shapes=({0: "batch"},), **names, verbose=False)
    assert program is not None  # the default, dynamo=True, always returns a program
    for node in program.model.graph:
        node.metadata_props.clear()  # stack traces with paths of this machine
    program.model.metadata_props.update(_metadata(description))
    program.save(path, external_data=False)


def _write_pt2(graph: nn.Module, example: Tensor, description: dict[str, Any], path: Path) -> None:
    program = torch.export.export(graph, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    with path.open("wb") as file:
        torch.export.save(program, file, extra_files={"reslab.json": json.dumps(description)})


def _write_safetensors(net: nn.Module, example: Tensor, description: dict[str, Any], path: Path) -> None:
    # cloned: safetensors refuses shared and non-contiguous tensors
    state = {name: value.clone(memory_format=torch.contiguous_format) for name, value in net.state_dict().items()}
    path.write_bytes(save(state, _metadata(description)))


def _read_onnx(net: nn.Module, path: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def _read_pt2(net: nn.Module, path: Path) -> Callable[[Tensor], Tensor]:
    with path.open("rb") as file:
        return torch.export.load(file).module()


def _read_safetensors(net: nn.Module, path: Path) -> Callable[[Tensor], Tensor]:
    return lambda images: torch.func.functional_call(net, load_file(path), images, strict=True)


# Writers trace the network on an example and store its description; readers return a function from images to logits.
WRITERS = {"onnx": _write_onnx, "pt2": _write_pt2, "safetensors": _write_safetensors}
READERS = {"onnx": _read_onnx, "pt2": _read_pt2, "safetensors": _read_safetensors}
