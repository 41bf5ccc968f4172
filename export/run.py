"""One export from beginning to end: what `efficientllm-export` runs, for Python."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..runtime.base import flags
from ..runtime.base.output import replaced_whole
from .checkpoint import open_checkpoint
from .manifest import foreign_files
from .request import ExportRequest, log
from .targets import load_exporter, option_names, refuse_option


def export(checkpoint: str | Path, target: str, output: str | Path, *, overwrite: bool = False, **options: Any) -> Path:
    """Write `checkpoint` as an artefact of `target` into the folder `output`, which is returned.

    `checkpoint`: run folder, Hugging Face folder or hub id, .gguf file, or "demo". `options`: the target's, by the
    names of its flags (`quantize="q8_0"`, `max_kl=0.3`). Raises UsageError for what cannot be used as given (an option
    that the target does not read), ModelError for an unsupported or damaged checkpoint and ArtefactError where the
    file does not verify; the folder is whole or absent. Reports to `logging.getLogger("efficientllm.export")`.

        export("runs/small", "gguf", "small", quantize="q8_0")
    """
    exporter, known = load_exporter(target), option_names(target)
    for name in options:
        if name not in known:
            refuse_option(target, name)
    chosen = flags.merge(exporter.options(), options, f"--target {target}")
    folder = Path(output)
    inputs = [checkpoint, *filter(None, [getattr(chosen, "calibrate", "")])]

    remedy = "give another --output, or --overwrite to replace it"
    with (
        replaced_whole(folder, overwrite, foreign_files, inputs, remedy) as temporary,
        open_checkpoint(str(checkpoint)) as opened,
    ):
        exporter.write(opened, ExportRequest(chosen, folder), temporary)
    log.info("artefact: %s", folder)
    return folder
