"""A plan as one self-contained page: nothing is fetched when it is opened."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from dapo_megatron.layout.plan import Plan
from dapo_megatron.layout.report import (
    KIND_WORDS,
    best_of_cuts,
    describe,
    gb,
    heading,
    kinds,
    nearest_first,
    saved,
    train_peak_bytes,
)
from dapo_megatron.layout.report_figures import memory_figure, space_figure, time_figure
from dapo_megatron.layout.report_yaml import yaml_of

REASONS_PER_KIND = 40
TEMPLATE = "report.html.j2"


def write_html(plan: Plan, top: int, file: Path) -> None:
    """The page of a plan; bars are of the `top` best layouts, the scatter of all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(page(plan, top), encoding="utf-8")


def page(plan: Plan, top: int) -> str:
    """The text of the page."""
    best = best_of_cuts(plan.candidates)[:top]
    figures = {"space": space_figure(plan)}
    if best:
        figures = {"memory": memory_figure(plan, best), "time": time_figure(best)} | figures
    reasons = {
        KIND_WORDS[kind]: (count, nearest_first([r for r in plan.rejections if r.kind == kind]))
        for kind, count in kinds(plan).items()
    }
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(TEMPLATE).render(
        plan=plan,
        best=best,
        heading=heading(plan.request),
        yaml=yaml_of(best[0].layout, plan.request) if best else "",
        reasons=reasons,
        most=REASONS_PER_KIND,
        describe=describe,
        gb=gb,
        saved=saved,
        train_peak_bytes=train_peak_bytes,
        plotly=Markup(get_plotlyjs()),
        figures={
            name: Markup(figure.to_html(full_html=False, include_plotlyjs=False, div_id=name, config={"displayModeBar": False}))
            for name, figure in figures.items()
        },
    )
