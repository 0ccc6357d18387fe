"""`holdfast cache lengthen`: a short encoder that reads long documents, trained on a domain."""

from pathlib import Path
from typing import Annotated

import typer

from holdfast import cli


def lengthen(
    model: Annotated[
        str,
        typer.Argument(help="Directory or cached hub id: BERT, RoBERTa, XLM-RoBERTa, CamemBERT."),
    ],
    out: Annotated[Path, typer.Option(help="Directory to write; it opens with AutoModel.")],
    domain: Annotated[
        list[str] | None, typer.Option(help="Text file, directory or JSONL; may be repeated.")
    ] = None,
    attention: Annotated[str, typer.Option(help="longformer or bigbird.")] = "longformer",
    length: Annotated[int, typer.Option(help="Tokens that the model shall read.")] = 4096,
    steps: Annotated[
        int | None, typer.Option(help="Optimizer steps; 0 converts alone [default: one epoch].")
    ] = None,
    batch: Annotated[int, typer.Option(help="Sequences in a step.")] = 1,
    learning_rate: Annotated[float, typer.Option(help="Highest; it warms up and falls.")] = 3e-5,
    window: Annotated[int, typer.Option(help="Tokens around one (longformer).")] = 512,
    block: Annotated[int, typer.Option(help="Tokens in a block (bigbird).")] = 64,
    glob: Annotated[str | None, typer.Option(help='Files of a directory, e.g. "**/*.py".')] = None,
    text_field: Annotated[str, typer.Option(help="Field of JSONL lines.")] = "text",
    validation: Annotated[float, typer.Option(help="Fraction of the data held out.")] = 0.05,
    checkpoint_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 50,
    seed: Annotated[int, typer.Option(help="Of masks and order.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu or cuda [default: cuda if any].")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Lengthen an encoder and train it on a domain's text; the same command again resumes.

    Example: holdfast cache lengthen roberta-base --domain notes/ --out roberta-4096 --steps 2000
    """
    with cli.stdout_is_json(json):
        from holdfast.context.attention.masked_lm import Run, Settings
        from holdfast.training import show
        from holdfast.training.data import DataSource

        source = None
        if domain:
            source = DataSource(
                tuple(domain), glob=glob, text_field=text_field, validation=validation, seed=seed
            )
        settings = Settings(
            model,
            source,
            attention=attention,
            length=length,
            steps=steps,
            batch=batch,
            learning_rate=learning_rate,
            window=window,
            block=block,
            checkpoint_every=checkpoint_every,
            seed=seed,
        )
        with show.progress() as on_step:
            report = Run(settings, out, device=device, on_step=on_step).run()
    if json:
        cli.print_json(report)
        return
    if report["steps"]:
        from rich.console import Console

        console = Console()
        console.print(show.bytes_table(report))
        losses = ", ".join(f"{k} {v:.4f}" for k, v in report["loss"].items() if v is not None)
        console.print(f"loss: {losses}; {report['steps']} steps, {report['seconds']:.1f} s")
    print(f"{out} reads {length} tokens and opens with AutoModel.from_pretrained({str(out)!r})")
