"""A run's network for use elsewhere: ONNX, a PyTorch 2 program, or safetensors, checked before it is handed out."""

import copy
import importlib.util
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

import reslab
from reslab.data import ImageData
from reslab.data.augment import normalize
from reslab.data.datasets import DataError
from reslab.data.samplers import BatchKey
from reslab.errors import UserError
from reslab.files import replacing, sha256_file, write_text
from reslab.inference import load_run
from reslab.runs import manifest as manifests
from reslab.runs.folder import RunFolder

Format = Literal["onnx", "pt2", "safetensors"]
CHECKED_IMAGES = 16
TOLERANCE = 1e-4  # of the greatest logit
NEEDED = ("onnx", "onnxscript", "onnxruntime")


class Normalized(nn.Module):
    """A network with its normalisation before it: uint8 images (N, C, H, W), 0 … 255, to logits (N, num_classes)."""

    def __init__(self, net: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.net = net
        self.scale: Tensor
        self.shift: Tensor
        centre, deviation = torch.tensor([mean, std], dtype=torch.float64)[:, :, None, None]
        self.register_buffer("scale", (1 / (255 * deviation)).float())
        self.register_buffer("shift", (-centre / deviation).float())

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images.float() * self.scale + self.shift)


def export(run: str, format: Format, out: Path, with_normalization: bool, overrides: list[str]) -> None:
    """Writes the network with the weights that a run tested, and FILE.json, which says all that its user must know.

    The file is read again and compared with the network on test images, or on noise where there are no test data:
    one that differs is not left behind. Everything is in float32, on the CPU; the batch may be of any size.

    Args:
        run: The run folder.
        format: onnx (for onnxruntime and others), pt2 (torch.export.load), or safetensors (the weights alone).
        out: The file; it appears when it is whole and checked.
        with_normalization: The graph takes uint8 images as they are decoded, and not normalised float images.
        overrides: Of the run's config, such as --data.root DIR.

    Raises:
        UserError: something is missing that the format needs, or the outputs differ by more than TOLERANCE.
    """
    if with_normalization and format == "safetensors":
        raise UserError("a safetensors file holds weights alone: leave out --with-normalization, its JSON states it")
    if format == "onnx" and (missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]):
        raise UserError(f"ONNX needs {', '.join(missing)}: pip install {' '.join(missing)}")
    data, model, _ = load_run(run, overrides, data_needed=False)
    net = model.net.float().eval().requires_grad_(False).to(memory_format=torch.contiguous_format)
    images, source = _images(data)
    said = {**_provenance(run), **_description(data, with_normalization)}
    statistics = data.dataset.mean, data.dataset.std
    graph: nn.Module = net
    given = normal = normalize(images, *statistics).contiguous()
    if with_normalization:
        graph, given = Normalized(net, *statistics).eval(), images.permute(0, 3, 1, 2).contiguous()
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as part:
        WRITERS[format](graph, given, said, part)
        difference, greatest = _difference(net, normal, READERS[format](net, part), given)
        told = f"max abs difference {difference:.1e} of {greatest:.3g}, on {len(given)} {source}"
        if not difference <= TOLERANCE * greatest:
            raise UserError(f"{out} was not written: its outputs are not the network's ({told})")
    check = {"images": source, "n": len(given), "max_abs_difference": difference, "max_abs_logit": greatest}
    record = {**said, "format": format, "sha256": sha256_file(out), "check": check}
    described = out.with_name(f"{out.name}.json")
    write_text(described, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB, {told}\n{described}")


def _images(data: ImageData) -> tuple[Tensor, str]:
    """A few images, uint8 (N, H, W, C), and what they are: the data's test images, from first to last, or noise."""
    try:
        n = len(data.test_data)
        batches = data.test_dataloader().dataset
        rows = np.linspace(0, n - 1, min(n, CHECKED_IMAGES)).astype(np.int64)
        return batches[BatchKey(rows)].images, "test images"
    except DataError:
        channels, *size = data.image_shape
        noise = torch.Generator().manual_seed(0)
        shape = (CHECKED_IMAGES, *size, channels)
        return torch.randint(256, shape, dtype=torch.uint8, generator=noise), "images of noise (the data are not here)"


def _provenance(run: str) -> dict[str, Any]:
    manifest = manifests.read(RunFolder(run).manifest)
    named = {key: manifest[key] for key in ("name", "id", "seed", "weights_sha256", "results")}
    return {"reslab": reslab.__version__, "run": named}


def _description(data: ImageData, with_normalization: bool) -> dict[str, Any]:
    """How to feed the network, and what its answers mean."""
    source, shape = data.dataset, list(data.image_shape)
    values = "0 … 255" if with_normalization else "(x / 255 - mean) / std, x in 0 … 255"
    return {
        "input": {
            "name": "images",
            "dtype": "uint8" if with_normalization else "float32",
            "shape": ["batch", *shape],
            "values": values,
            "mean": source.mean,
            "std": source.std,
            "resize": f"the shorter side to {data.test_resize}, antialiased, then the centre {shape[1]} × {shape[2]}",
        },
        "output": {"name": "logits", "dtype": "float32", "shape": ["batch", data.num_classes]},
        "classes": data.class_names,
    }


@torch.inference_mode()
def _difference(
    net: nn.Module, normal: Tensor, exported: Callable[[Tensor], Tensor], given: Tensor
) -> tuple[float, float]:
    """The greatest difference between the logits of a network and of its export, and the greatest logit."""
    pairs = [(net(normal[:n]), exported(given[:n])) for n in (1, len(given))]  # batches of two sizes
    return max(float((a - b).abs().max()) for a, b in pairs), max(float(a.abs().max()) for a, _ in pairs)


def _texts(said: dict[str, Any]) -> dict[str, str]:
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in said.items()}


# Each writes a network that takes the images given, with a description, to a path.


def _write_onnx(graph: nn.Module, given: Tensor, said: dict[str, Any], path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            graph,
            (_pair(given),),
            dynamic_shapes=({0: "batch"},),
            input_names=["images"],
            output_names=["logits"],
            dynamo=True,
            verbose=False,
        )
    assert program is not None  # it is with dynamo=True
    for node in program.model.graph:
        node.metadata_props.clear()  # stack traces: the paths of this machine are nobody's business
    program.model.metadata_props.update(_texts(said))
    program.save(path, external_data=False)


def _write_pt2(graph: nn.Module, given: Tensor, said: dict[str, Any], path: Path) -> None:
    program = torch.export.export(graph, (_pair(given),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    with path.open("wb") as file:
        torch.export.save(program, file, extra_files={"reslab.json": json.dumps(said)})


def _write_safetensors(net: nn.Module, given: Tensor, said: dict[str, Any], path: Path) -> None:
    path.write_bytes(save(net.state_dict(), _texts(said)))


def _pair(given: Tensor) -> Tensor:
    return given[[0, 0]]  # a traced batch of one would stay one


# Each reads such a file, and gives a function from images to logits.


def _read_onnx(net: nn.Module, path: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def _read_pt2(net: nn.Module, path: Path) -> Callable[[Tensor], Tensor]:
    with path.open("rb") as file:
        return torch.export.load(file).module()


def _read_safetensors(net: nn.Module, path: Path) -> Callable[[Tensor], Tensor]:
    other = copy.deepcopy(net)
    other.load_state_dict(load_file(path))
    return other


WRITERS = {"onnx": _write_onnx, "pt2": _write_pt2, "safetensors": _write_safetensors}
READERS = {"onnx": _read_onnx, "pt2": _read_pt2, "safetensors": _read_safetensors}
