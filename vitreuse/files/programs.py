"""A trained model as files that others run: a hub folder, safetensors, a program of torch.export, ONNX.

Programs are checked against the model before they are kept: on images, in batches of other sizes than the traced one.

Shapes: B images of a batch.
"""

import copy
import io
import json
import logging
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from vitreuse.attention.base import Attention
from vitreuse.compress.fold import fold
from vitreuse.cost.counters import torch_flops
from vitreuse.files.hub import CONFIG, WEIGHTS, model_weights, plan_text, preprocessing, save_hub_folder
from vitreuse.files.model_card import Provenance, model_card
from vitreuse.io.durable import TEMPORARY_FILES, write_durably
from vitreuse.model.class_names import LABEL_NAMES, names_of, pack_names
from vitreuse.model.copies import evaluating
from vitreuse.model.merge import DECIDED_BY, are_decided
from vitreuse.model.preprocessing import example

Predict = Callable[[Tensor], Tensor]  # images (B, channels, rows, columns) to logits (B, classes)
README = "README.md"
FILES = {"hub": (WEIGHTS, CONFIG, README), "safetensors": (WEIGHTS,), "torch": ("model.pt2",), "onnx": ("model.onnx",)}
MARKS = {  # by which a file is known for one of ours
    WEIGHTS: b'"keywords"',
    CONFIG: b'"architecture"',
    README: b"exported by vitreuse",
    "model.pt2": b"model.json",
    "model.onnx": b"preprocessing",
}
PROGRAMS = ("torch", "onnx")  # the formats that hold a program, which is checked
OPSETS = range(18, 24)  # from the first that torch's exporter writes to the last that torch 2.14 knows
DIFFERENCE_LIMIT = 1e-4  # of logits, over their standard deviation
ONNX_BYTES = 2**31  # of one protobuf message


class Check(NamedTuple):
    """How far a program is from the model.

    Attributes:
        difference: The largest of the logits, over their standard deviation.
        num_left_out: Images left out of it, whose logits differ more because rounding decides which tokens merge.
    """

    difference: float
    num_left_out: int


@torch.no_grad()
def export(
    model: Any,
    known: Provenance,
    folder: Path,
    formats: Sequence[str],
    batches: Iterable[Tensor],
    folds: bool,
    opset: int,
) -> dict[str, Check]:
    """Writes a model in each of the formats; each file is whole or not there, and none is if a program is wrong.

    Args:
        model: A ViT of timm or ours in float32 on the CPU, made by timm.create_model; its mode is restored.
        known: What else is known of it.
        folder: For the files; made where it is missing. What an earlier export left is replaced.
        formats: Of FILES.
        batches: Images (B, channels, rows, columns) that programs are checked on, which are gone over again and again.
        folds: Whether programs are of the folded model, see vitreuse.fold.
        opset: The version of ONNX's operators.

    Returns:
        How far each program is from the model.

    Raises:
        ValueError: The folder holds something else or cannot be written, the model cannot be traced, a package is
            missing, or a program's logits are not the model's.
    """
    check_folder(folder, formats)
    chosen = [of for of in PROGRAMS if of in formats]
    contents, checks = {}, {}
    if chosen:
        with evaluating(model):
            contents, checks = programs(model, known, chosen, batches, folds, opset)
    if "safetensors" in formats:
        contents[WEIGHTS] = model_weights(model, known.training)
    if "hub" in formats:
        save_hub_folder(model, folder, known.training)
        macs = torch_flops(in_export_form(model), example(model, 1))[""] // 2
        contents[README] = model_card(model, known, macs).encode()
    for file, content in contents.items():
        write_durably(folder / file, content)
    return checks


def programs(
    model: Any, known: Provenance, formats: Sequence[str], batches: Iterable[Tensor], folds: bool, opset: int
) -> tuple[dict[str, bytes], dict[str, Check]]:
    """The content of each program's file, and how far each is from the model; arguments as for export."""
    if "onnx" in formats:
        require_onnx(model)
    program = trace(fold(model) if folds else model, len(next(iter(batches))) + 1)
    facts = {"name": model.pretrained_cfg["architecture"], "plan": plan_text(model) or ""}
    facts["preprocessing"] = json.dumps(preprocessing(model))
    facts |= {"training": known.training} if known.training is not None else {}
    class_names = names_of(model)
    facts |= {LABEL_NAMES: pack_names(class_names)} if class_names is not None else {}
    contents, checks = {}, {}
    for of in formats:
        content = pack_torch(program, facts) if of == "torch" else pack_onnx(program, facts, opset)
        predict = load_torch(content) if of == "torch" else load_onnx(content)
        checks[of] = checked(of, predict, model, batches)
        contents[FILES[of][0]] = content
    return contents, checks


def check_folder(folder: Path, formats: Sequence[str]) -> None:
    """Makes the folder, if it is new.

    Raises:
        ValueError: It holds what is no earlier export of these formats, or cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{folder} cannot be made ({error.strerror}): choose another -o DIR.") from error
    written = {file for of in formats for file in FILES[of]}
    found = sorted(path for path in folder.iterdir() if not path.match(TEMPORARY_FILES))
    for path in found:
        if not _is_exported(path):
            raise ValueError(f"{folder} holds {path.name}, which is of no export: choose another -o DIR.")
        if path.name not in written:
            others = ", ".join(of for of, files in FILES.items() if path.name in files)
            raise ValueError(
                f"{folder} holds {path.name} of an earlier export: choose another -o DIR, or add --format {others}."
            )
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{folder} cannot be written: choose another -o DIR.")


def _is_exported(path: Path) -> bool:
    """Whether a file is one that an export wrote, by what each has in it."""
    mark = MARKS.get(path.name)
    if mark is None or not path.is_file() or not path.stat().st_size:
        return False
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(mark) >= 0


def require_onnx(model: Any) -> None:
    """Refuses what would fail late.

    Raises:
        ValueError: A package is not installed, or the model is too large for one file.
    """
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if find_spec(package) is None:
            raise ValueError(f"the format onnx needs {package}: install it with pip install 'vitreuse[export]'.")
    num_bytes = sum(parameter.nbytes for parameter in model.parameters())
    if num_bytes >= ONNX_BYTES:
        raise ValueError(f"{num_bytes / 2**30:.1f} GiB of weights do not fit into an ONNX file of 2 GiB: use torch.")


def in_export_form(model: Any) -> Any:
    """A copy whose layers compute attention in one way, whatever device and shapes they are traced on.

    A map that later layers read is made once and carried. Attention that nobody reads stays one operation, as which
    runtimes know it. No measured costs of this machine decide.
    """
    copied = copy.deepcopy(model).eval().requires_grad_(False)
    for module in copied.modules():
        if isinstance(module, Attention):
            module.reuse_backend, module.costs = "map", {}
        if hasattr(module, "fused_attn"):
            module.fused_attn = True
    for parameter in copied.parameters():
        parameter.data = parameter.data.contiguous()  # torch.export.save wants whole storages, fold leaves transposes
    return copied


def trace(model: Any, batch_size: int) -> ExportedProgram:
    """The model as a program of torch.export for batches of any size, traced at one above 1.

    Raises:
        ValueError: The model is none that torch.export takes.
    """
    images = example(model, batch_size)
    try:
        with silenced():
            program = torch.export.export(in_export_form(model), (images,), dynamic_shapes=({0: Dim("batch")},))
    except Exception as error:  # whatever the model's code and its trace lead to
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise ValueError(
            f"torch.export cannot take this {type(model).__name__} ({reason}): export it as hub or safetensors."
        ) from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # it would publish paths of this machine
    return program


@contextmanager
def silenced() -> Iterator[None]:
    """Keeps back what torch logs and prints of a failed trace: pages, whose first line the error has."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def pack_torch(program: ExportedProgram, facts: dict[str, str]) -> bytes:
    """The content of a .pt2 file, with facts about the model beside the program."""
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={"model.json": json.dumps(facts)})
    return buffer.getvalue()


def pack_onnx(program: ExportedProgram, facts: dict[str, str], opset: int) -> bytes:
    """The content of an .onnx file from ``images`` to ``logits``, with facts about the model as metadata.

    Raises:
        ValueError: The exporter has no operator for a part of the model.
    """
    from onnx.helper import set_model_props
    from onnxscript.function_libs.torch_lib.ops.core import aten_sort  # into TopK, which takes the first of equals
    from onnxscript.ir.passes.common import ClearMetadataAndDocStringPass

    try:
        exported: Any = torch.onnx.export(
            program,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: "batch"},),
            opset_version=opset,
            custom_translation_table={torch.ops.aten.sort.stable: aten_sort},
            dynamo=True,
            verbose=False,
        )
    except torch.onnx.OnnxExporterError as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise ValueError(f"torch.onnx cannot take this model ({reason}): export it as torch.") from error
    ClearMetadataAndDocStringPass()(exported.model)  # where each node comes from is larger than the graph
    proto = exported.model_proto
    set_model_props(proto, facts)
    return proto.SerializeToString()


def load_torch(content: bytes) -> Predict:
    """What a .pt2 file computes."""
    return torch.export.load(io.BytesIO(content)).module()


def load_onnx(content: bytes) -> Predict:
    """What an .onnx file computes in onnxruntime, on a CPU and as many threads as torch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # others measure in turns with it
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def checked(of: str, predict: Predict, model: Any, batches: Iterable[Tensor]) -> Check:
    """Compares the logits of the first image alone and of all batches, of which one is in memory at a time.

    Raises:
        ValueError: They differ by more than DIFFERENCE_LIMIT, or are no numbers; or no image can be compared.
    """

    def inputs() -> Iterator[Tensor]:
        yield next(iter(batches))[:1]
        yield from batches

    pairs = [(model(images), predict(images)) for images in inputs()]
    wanted, found = (torch.cat(answers).flatten(1) for answers in zip(*pairs, strict=True))
    apart = (found - wanted).abs().amax(1) / wanted.std().clamp_min(torch.finfo(wanted.dtype).tiny)
    left_out = (apart > DIFFERENCE_LIMIT) & apart.isfinite()
    if left_out.any():
        left_out &= ~torch.cat([are_decided(model, images) for images in inputs()])
    if left_out.all():
        raise ValueError(
            f"the {of} program's logits differ from the model's for each of {len(apart) - 1} images, of whose tokens "
            f"rounding decides which merge (by cosines less than {DECIDED_BY:.0e} apart): no file is kept; other "
            "images by --data DIR, or more of them, may be compared."
        )
    difference = float(apart[~left_out].max())
    if not difference <= DIFFERENCE_LIMIT:
        raise ValueError(
            f"the {of} program's logits differ from the model's by {difference:.1e} of their standard deviation, above "
            f"{DIFFERENCE_LIMIT:.0e}: no file is kept; another --opset or format may be right."
        )
    return Check(difference, int(left_out[1:].sum()))
