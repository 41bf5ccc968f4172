"""`efficientllm-export`: write a checkpoint as an artefact, from the command line or from Python."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..runtime.base import flags
from ..runtime.base.extras import require_extra
from ..runtime.base.model_names import check_adapter, check_source
from ..runtime.base.output import atomic_output
from ..runtime.chat_template import read_template_file
from ..train.data.documents import DataSpec, check_documents
from ..train.model.foreign_configs import ImportOptions
from .checkpoint import open_checkpoint
from .manifest import foreign_files
from .request import ExportRequest, VerifyOptions, log
from .targets import known_targets, load_exporter, option_names, readers_of, refuse_option


def export(
    checkpoint: str | Path,
    target: str,
    output: str | Path,
    *,
    overwrite: bool = False,
    head_dim: int | None = None,
    trust_remote_code: bool = False,
    adapter: str = "",
    chat_template: str = "",
    **options: Any,
) -> Path:
    """Write `checkpoint` as an artefact of `target` into the folder `output` and return the folder.

    `checkpoint` is a run folder, a Hugging Face folder or hub id, a .gguf file, or "demo". `options` are the target's
    flags by name (`quantize="q8_0"`, `max_kl=0.3`). `head_dim` and `trust_remote_code` apply to checkpoints of other
    pruning tools, `adapter` is a LoRA adapter of the checkpoint. `chat_template` is a file with another template.

    Raises UsageError for unusable arguments, ModelError for an unsupported or damaged checkpoint, and ArtefactError if
    the file does not verify. The folder is whole or absent. Reports to `logging.getLogger("efficientllm.export")`.

    export("runs/small", "gguf", "small", quantize="q8_0")
    """
    # all that can be refused is refused before the checkpoint is read
    exporter, known = load_exporter(target), option_names(target)
    check_source(str(checkpoint), str(checkpoint))
    if adapter:
        check_adapter(adapter)
    template = read_template_file(chat_template) if chat_template else ""
    for name in options:
        if name not in known:
            refuse_option(target, name)
    chosen = flags.merge(exporter.options(), options, f"--target {target}")
    calibrate: str = getattr(chosen, "calibrate", "")
    if calibrate:
        check_documents(DataSpec(calibrate, flag="--calibrate"))
    exporter.check(chosen)
    require_extra(
        "export", "ml_dtypes", "safetensors", *(("torch", "transformers") if getattr(chosen, "verify", False) else ())
    )
    folder = Path(output)
    inputs = [checkpoint, *filter(None, [calibrate, chat_template])]
    remedy = "give another --output, or --overwrite to replace it"
    imports = ImportOptions(head_dim, trust_remote_code, adapter)
    request = ExportRequest(chosen, folder)
    with atomic_output(folder, overwrite, foreign_files, inputs, remedy) as temporary:
        request.clock.begin(f"reading {checkpoint}")
        with open_checkpoint(str(checkpoint), imports, template) as opened:
            request.notes.extend(opened.notes)
            request.limits.extend(opened.doubts)
            if opened.context_length < (positions := opened.config["max_position_embeddings"]):
                request.limits.append(f"the context ends after {opened.context_length:,} of {positions:,} tokens")
            if not getattr(chosen, "verify", True):
                request.limits.append("not verified")
            exporter.write(opened, request, temporary)
    request.clock.end()
    log.info("; ".join((f"artefact: {folder} in {request.clock}", *request.limits)))
    return folder


class ExportParser(flags.Parser):
    """Parser with the flags of the target in the arguments; without a target, the flags that all targets share."""

    def parse(self, argv: Sequence[str]) -> dict[str, Any]:
        """Return all values by name. Raises UsageError for a flag that the target does not have."""
        target = _named_target(argv)
        flags.add_section(self, load_exporter(target).options if target else VerifyOptions)
        _, unknown = self.parse_known_intermixed_args(argv)
        foreign = next((word.partition("=")[0] for word in unknown if word.startswith("--")), "")
        name = foreign.removeprefix("--").removeprefix("no-").replace("-", "_")
        if target and readers_of(name):
            refuse_option(target, name, foreign)
        return super().parse(argv)


def _named_target(argv: Sequence[str]) -> str | None:
    first = flags.Parser(add_help=False)
    first.add_argument("--target")
    target: str | None = first.parse_known_args(argv)[0].target
    return target


def build_parser() -> ExportParser:
    parser = ExportParser(
        ImportOptions,
        prog="efficientllm-export",
        examples=(
            "export runs/small --target gguf --quantize q4_0 --output small-gguf",
            "export runs/small --target onnx --quantize int8 --output small-onnx",
        ),
        description="Write a checkpoint as a file that stock runtimes load, and verify it against torch.",
        epilog="%(prog)s --target TARGET --help lists the flags of one target.",
    )
    parser.add_argument(
        "checkpoint", help="run folder, Hugging Face folder or hub id, .gguf file, or 'demo' (the built-in source)"
    )
    targets = "{" + ",".join(known_targets()) + "}"
    parser.add_argument("--target", required=True, metavar=targets, help="format to write")
    parser.add_argument("--output", metavar="FOLDER", help="folder to write [CHECKPOINT-TARGET-QUANTIZE]")
    parser.add_argument(
        "--chat-template", default="", metavar="FILE", help="file with a chat template instead of the checkpoint's"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the contents of --output")
    return parser


def body(argv: Sequence[str]) -> int:
    arguments = build_parser().parse(argv)
    checkpoint, target, output = (arguments.pop(name) for name in ("checkpoint", "target", "output"))
    parts = [Path(checkpoint).name, target, arguments.get("quantize")]
    output = "-".join(filter(None, parts)) if output is None else output
    export(checkpoint, target, output, **arguments)
    return 0
