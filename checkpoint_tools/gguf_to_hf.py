"""The command gguf-to-hf: a small real model for people without a hub."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import typer

from checkpoint_tools.byte_sizes import format_bytes
from checkpoint_tools.errors import writing
from checkpoint_tools.export_worker import hash_tensor
from checkpoint_tools.manifest import Manifest, TensorRecord, source_files, write_provenance
from checkpoint_tools.output_folder import check_target, open_output
from checkpoint_tools.spans import SpanReader, SpanTensor, whole_span
from dapo_megatron.types import CheckpointError
from dapo_megatron.weights.gguf import require_gguf, write_gguf_as_hf
from dapo_megatron.weights.hf_files import HfFiles

_MAGIC = b"GGUF"
_BAND_BYTES = 16 * 2**20


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line says."""

    source: Path
    out: Path
    force: bool = False
    as_json: bool = False


def run(options: Options) -> None:
    """The command. Prints a summary, or one JSON object."""
    check_target(options.out, options.force)
    file = find_gguf(options.source)
    require_gguf()
    facts = {"source": str(file.absolute()), "source_files": source_files([file], file.parent)}
    with open_output(options.out, {"command": "gguf-to-hf", **facts}, options.force) as folder:
        with writing(folder.path):
            shutil.rmtree(folder.path)
            folder.path.mkdir()
            try:
                write_gguf_as_hf(file, folder.path)
            except CheckpointError:
                folder.discard()
                raise
            manifest = _manifest_of(folder.path)
            manifest.write(folder.path)
            write_provenance(folder.path, **facts, fingerprint=manifest.fingerprint())
        folder.finish()
    num_bytes = sum(path.stat().st_size for path in options.out.glob("*.safetensors"))
    if options.as_json:
        typer.echo(
            json.dumps(
                {"source": str(file), "out": str(options.out), "num_tensors": len(manifest.tensors), "written_bytes": num_bytes}
            )
        )
    else:
        typer.echo(
            f"wrote {options.out}: {len(manifest.tensors)} tensors, {format_bytes(num_bytes)}, dequantised to fp32, from {file}"
        )


def find_gguf(path: Path) -> Path:
    """The GGUF file at `path`, or the only one in that folder. CheckpointError when there is none, or a choice."""
    if path.is_dir():
        files = sorted(path.glob("*.gguf"))
        if len(files) != 1:
            found = ", ".join(file.name for file in files) or "none"
            raise CheckpointError(f"{path} must hold one .gguf file, and holds {found}; give the file itself")
        path = files[0]
    try:
        with path.open("rb") as file:
            magic = file.read(len(_MAGIC))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); give a GGUF file or the folder of one") from error
    if magic != _MAGIC:
        raise CheckpointError(f"{path} is no GGUF file: it starts with {magic!r}, not {_MAGIC!r}; get the file again")
    return path


def _manifest_of(directory: Path) -> Manifest:
    reader, records = SpanReader(), {}
    for name, header in HfFiles(directory).tensors.items():
        span = whole_span(directory / header.file, header.offset, header.shape, header.dtype)
        tensor = SpanTensor(name, header.shape, header.dtype, (span,))
        records[name] = TensorRecord(header.shape, header.dtype, hash_tensor(reader, tensor, _BAND_BYTES, lambda _: None))
    reader.close()
    return Manifest(records)
