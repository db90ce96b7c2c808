"""The command line of the checkpoint tools. Thin: parse, hand over, print; heavy imports happen inside the commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from checkpoint_tools.errors import InterruptedWork, WriteError
from dapo_megatron.types import ConfigError, DapoMegatronError

EXIT_FAILED = 1
"""Work began and failed, or `verify` found a difference."""
EXIT_BAD_INPUT = 2
"""Nothing was begun: the command or the checkpoint must be mended first."""
EXIT_INTERRUPTED = 130
"""ctrl-c."""

app = typer.Typer(
    name="checkpoint-tools",
    help="""Convert checkpoints between Hugging Face and megatron-core, and prove them.

No model is built, no process group is started, no GPU and no TransformerEngine is needed: a login node will do.

**Start here**

- `checkpoint-tools hf-to-megatron models/Qwen2.5-7B ckpt/qwen --dry-run`: what would happen, how much and how long
- `checkpoint-tools hf-to-megatron models/Qwen2.5-7B ckpt/qwen`: then load it with Megatron under any layout
- `checkpoint-tools megatron-to-hf runs/quickstart models/trained`: and back, of a run or of Megatron-LM
- `checkpoint-tools verify models/Qwen2.5-7B ckpt/qwen`: bit by bit, tensor by tensor

**Exit codes** 0: done. 1: begun and failed, or a difference found; the same command goes on where it stopped. 2: nothing was begun,
mend the input. 130: interrupted; the same command goes on.
""",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)

Workers = Annotated[
    int | None, typer.Option("--workers", help="Processes. Default: one a processor, at most 8.", show_default=False)
]
MaxMemory = Annotated[
    str, typer.Option("--max-memory", metavar="SIZE", help="Of all buffers together, e.g. 8GiB; whatever the model's size.")
]
Force = Annotated[
    bool, typer.Option("--force", help="Replace OUT_DIR, once the new one is complete; throw away unfinished work.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Prove the plan and print bytes, files, memory and predicted seconds; write nothing.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]


def main() -> None:
    """Entry point of the `checkpoint-tools` command: errors of the user are one line each, errors of ours are tracebacks."""
    try:
        app()
    except DapoMegatronError as error:
        for problem in error.problems if isinstance(error, ConfigError) else [str(error)]:
            typer.secho(f"error: {problem}", fg="red", err=True)
        raise SystemExit(_exit_code(error)) from None


def _exit_code(error: DapoMegatronError) -> int:
    match error:
        case InterruptedWork():
            return EXIT_INTERRUPTED
        case WriteError():
            return EXIT_FAILED
    return EXIT_BAD_INPUT


@app.command("hf-to-megatron")
def hf_to_megatron(
    hf_dir: Annotated[Path, typer.Argument(metavar="HF_DIR", help="Folder with config.json and weights.", show_default=False)],
    out_dir: Annotated[
        Path, typer.Argument(metavar="OUT_DIR", help="Folder to make; give it to Megatron's --load.", show_default=False)
    ],
    dtype: Annotated[
        Literal["keep", "bf16"], typer.Option("--dtype", help="keep: the bytes as they are. bf16: rounded.")
    ] = "keep",
    workers: Workers = None,
    max_memory: MaxMemory = "8GiB",
    dry_run: DryRun = False,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Hugging Face to megatron-core's `torch_dist` format, which loads under any TP, PP, VPP, EP and ETP.

    Reads safetensors, one file or sharded, or pytorch_model.bin, slice by slice. OUT_DIR appears when it is complete; until then the
    work is in OUT_DIR.partial, and the same command goes on after a kill, a full disk or ctrl-c.

    **Examples**

    - `checkpoint-tools hf-to-megatron models/Qwen2.5-7B ckpt/qwen`
    - `checkpoint-tools hf-to-megatron models/Qwen2.5-7B ckpt/qwen --dtype bf16 --workers 4 --max-memory 2GiB`

    Megatron-LM then takes `--load OUT_DIR --use-checkpoint-args --ckpt-format torch_dist`; megatron-core's `dist_checkpointing.load` takes
    OUT_DIR/release.
    """
    from checkpoint_tools.byte_sizes import parse_bytes
    from checkpoint_tools.hf_to_megatron import Options, run

    run(Options(hf_dir, out_dir, dtype, workers, parse_bytes(max_memory), dry_run, force, as_json))


@app.command("megatron-to-hf")
def megatron_to_hf(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="CKPT_DIR",
            help="torch_dist or legacy checkpoint, Megatron-LM's folder of them, or a run of dapo-megatron (the newest).",
            show_default=False,
        ),
    ],
    out_dir: Annotated[Path, typer.Argument(metavar="OUT_DIR", help="Hugging Face directory to make.", show_default=False)],
    hf_config: Annotated[
        Path | None,
        typer.Option(
            "--hf-config",
            metavar="HF_DIR",
            help="Folder with the model's config.json and tokenizer. Default: what the checkpoint was converted or trained from.",
            show_default=False,
        ),
    ] = None,
    shard_size: Annotated[str, typer.Option("--shard-size", metavar="SIZE", help="Of one safetensors file at most.")] = "5GB",
    workers: Workers = None,
    max_memory: MaxMemory = "8GiB",
    dry_run: DryRun = False,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """megatron-core's `torch_dist` format to a Hugging Face directory that `from_pretrained` loads.

    Takes checkpoints of any layout, with or without optimizer state, layers stacked or apart. First it is proven that every
    element of every tensor is saved exactly once and that config.json is this model's. Padding of vocabulary and query groups is cut.

    **Examples**

    - `checkpoint-tools megatron-to-hf runs/quickstart models/trained`: the newest checkpoint of a run
    - `checkpoint-tools megatron-to-hf ckpt/iter_0000100 models/trained --hf-config models/Qwen2.5-7B --dry-run`
    """
    from checkpoint_tools.byte_sizes import parse_bytes
    from checkpoint_tools.megatron_to_hf import Options, run

    run(
        Options(
            checkpoint, out_dir, hf_config, parse_bytes(shard_size), workers, parse_bytes(max_memory), dry_run, force, as_json
        )
    )


@app.command()
def reshard(
    checkpoint: Annotated[
        Path,
        typer.Argument(metavar="CKPT_DIR", help="Legacy checkpoint: folder of mp_rank_*, or of iterations.", show_default=False),
    ],
    out_dir: Annotated[
        Path, typer.Argument(metavar="OUT_DIR", help="Folder to make; give it to Megatron's --load.", show_default=False)
    ],
    tensor: Annotated[
        int | None, typer.Option("--tensor", metavar="TP", help="Tensor-parallel size.", show_default=False)
    ] = None,
    pipeline: Annotated[int | None, typer.Option("--pipeline", metavar="PP", help="Pipeline stages.", show_default=False)] = None,
    virtual_pipeline: Annotated[
        int | None, typer.Option("--virtual-pipeline", metavar="VPP", help="Model chunks of a stage.", show_default=False)
    ] = None,
    expert: Annotated[
        int | None, typer.Option("--expert", metavar="EP", help="Expert-parallel size.", show_default=False)
    ] = None,
    expert_tensor: Annotated[
        int | None,
        typer.Option("--expert-tensor", metavar="ETP", help="Ranks that an expert is cut over. Default: TP.", show_default=False),
    ] = None,
    layers_per_stage: Annotated[
        str | None,
        typer.Option(
            "--layers-per-stage", metavar="N,N,...", help="Uneven pipeline stages: one number each.", show_default=False
        ),
    ] = None,
    vocab_size: Annotated[
        int | None,
        typer.Option(
            "--vocab-size", metavar="N", help="Tokens without padding. Default: what the checkpoint says.", show_default=False
        ),
    ] = None,
    divisible_by: Annotated[
        int | None,
        typer.Option(
            "--make-vocab-size-divisible-by",
            metavar="N",
            help="The vocabulary is padded to a multiple of N x TP. Default: as in the checkpoint, else 128.",
            show_default=False,
        ),
    ] = None,
    workers: Workers = None,
    max_memory: MaxMemory = "8GiB",
    dry_run: DryRun = False,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """A legacy Megatron-LM checkpoint (one file a rank) under another TP, PP, VPP, EP and ETP, bit by bit.

    What is not given stays as it is. `torch_dist` checkpoints load under any layout and need none of this. Optimizer state is left out.

    **Examples**

    - `checkpoint-tools reshard ckpt/gpt ckpt/gpt-tp2-pp4 --tensor 2 --pipeline 4`
    - `checkpoint-tools reshard ckpt/gpt/iter_0000100 out --pipeline 4 --layers-per-stage 7,9,9,7 --dry-run`
    """
    from checkpoint_tools.byte_sizes import parse_bytes, parse_counts
    from checkpoint_tools.reshard import Options, run

    run(
        Options(
            checkpoint=checkpoint,
            out=out_dir,
            tensor=tensor,
            pipeline=pipeline,
            virtual_pipeline=virtual_pipeline,
            expert=expert,
            expert_tensor=expert_tensor,
            layers_per_stage=None if layers_per_stage is None else parse_counts(layers_per_stage),
            vocab_size=vocab_size,
            divisible_by=divisible_by,
            num_workers=workers,
            max_memory=parse_bytes(max_memory),
            dry_run=dry_run,
            force=force,
            as_json=as_json,
        )
    )


@app.command()
def verify(
    a: Annotated[Path, typer.Argument(metavar="A", help="Hugging Face directory or Megatron checkpoint.", show_default=False)],
    b: Annotated[Path, typer.Argument(metavar="B", help="The other one, of either kind.", show_default=False)],
    hf_config: Annotated[
        Path | None,
        typer.Option(
            "--hf-config",
            metavar="HF_DIR",
            help="Folder of the model's config.json, where neither checkpoint says which model it is.",
            show_default=False,
        ),
    ] = None,
    logits: Annotated[
        bool, typer.Option("--logits", help="Run both in fp32 on the same tokens as well and compare logits: small models.")
    ] = False,
    workers: Workers = None,
    max_memory: MaxMemory = "8GiB",
    as_json: AsJson = False,
) -> None:
    """Whether two checkpoints hold the same model, bit by bit.

    Both are read to the end, in bands. A difference is reported with tensor, first index, both values and the largest difference;
    hashes recorded when a side was written (manifest.json, a run's COMPLETE) are compared with what is there now.

    **Examples**

    - `checkpoint-tools verify models/Qwen2.5-7B ckpt/qwen`: is the conversion right?
    - `checkpoint-tools verify ckpt/iter_0000100 models/trained --json`

    Exit code 1: they differ.
    """
    from checkpoint_tools.byte_sizes import parse_bytes
    from checkpoint_tools.verification import Options, run

    equal = run(Options(a, b, hf_config, workers, parse_bytes(max_memory), logits, as_json))
    raise typer.Exit(0 if equal else EXIT_FAILED)


@app.command()
def inspect(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="PATH",
            help="Hugging Face directory, torch_dist checkpoint, legacy mp_rank_* folder, or a run (the newest checkpoint).",
            show_default=False,
        ),
    ],
    pattern: Annotated[
        str | None,
        typer.Option("--filter", metavar="PATTERN", help="Only tensors whose name fits, e.g. `*layers.3.*`.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """What a checkpoint holds: names, shapes, dtypes, files, bytes, parameters, family, step and the layout it was saved under.

    Reads headers alone, so it takes seconds whatever the size.

    **Examples**

    - `checkpoint-tools inspect runs/quickstart`
    - `checkpoint-tools inspect ckpt/iter_0000100 --filter '*linear_qkv*' --json`
    """
    from checkpoint_tools.inspection import run

    run(path, pattern, as_json=as_json)


@app.command("gguf-to-hf")
def gguf_to_hf(
    source: Annotated[Path, typer.Argument(metavar="FILE_OR_DIR", help="GGUF file, or the folder of one.", show_default=False)],
    out_dir: Annotated[Path, typer.Argument(metavar="OUT_DIR", help="Hugging Face directory to make.", show_default=False)],
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """A GGUF file to a Hugging Face directory: weights dequantised to fp32, config, tokenizer and chat template.

    Through transformers' own GGUF reader; the whole model is in memory, 4 bytes a parameter. Needs `pip install dapo-megatron[smollm2]`.

    **Example**

    - `checkpoint-tools gguf-to-hf models/smollm2.gguf models/SmolLM2`
    """
    from checkpoint_tools.gguf_to_hf import Options, run

    run(Options(source, out_dir, force, as_json))


@app.callback()
def _options() -> None:
    pass


if __name__ == "__main__":
    main()
