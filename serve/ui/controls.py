"""The pickers of one arm: model, adapter, strategy with its parameters, sampling."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import gradio as gr

from serve.ui.answers import SEPARATOR
from serve.ui.catalog import NO_ADAPTER, Catalog, parameters_of, short_name

MAX_NEW_TOKENS = 4096
# Fields of an arm that are told, their names for people, and values that say nothing.
_TOLD = (
    ("adapter_scale", "scale", 1), ("temperature", "T", None), ("top_p", "top p", 0.95),
    ("top_k", "top k", 0), ("min_p", "min p", 0), ("repetition_penalty", "repetition", 1.1),
)  # fmt: skip
# Of all events: no API of their own, and no progress drawn over what they change.
PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
_QUIET = {**PRIVATE, "queue": False}


class ArmControls:
    """Components that say what to ask, and the fields of a request that follow from them.

    Args:
        catalog: of the session.
        elem_id: the components' ids begin with it.
        strategy: chosen at first, if the server has it; None: the server's default.
    """

    def __init__(self, catalog: gr.State, *, elem_id: str, strategy: str | None = None) -> None:
        self._catalog, self._first = catalog, strategy
        # Any value is allowed, because a server that was restarted has forgotten the choices of
        # open pages. What does not exist is refused by the API.
        with gr.Group(elem_classes="pickers"):
            self.model = gr.Dropdown(
                [], label="Model", elem_id=f"{elem_id}-model", allow_custom_value=True
            )
            self.adapter = gr.Dropdown(
                [(NO_ADAPTER, "")], value="", label="Adapter", elem_id=f"{elem_id}-adapter",
                allow_custom_value=True,
            )  # fmt: skip
            self.scale = gr.Slider(
                0, 1, value=1, step=0.05, label="Adapter scale", visible=False,
                elem_id=f"{elem_id}-scale",
            )  # fmt: skip
            self.strategy = gr.Dropdown(
                [], label="Decoding strategy", elem_id=f"{elem_id}-strategy",
                allow_custom_value=True,
            )  # fmt: skip
            self.parameters = gr.State({})
            self._render_parameters(elem_id)
        self.temperature = gr.Slider(
            0, 2, value=0.7, step=0.05, label="Temperature", elem_id=f"{elem_id}-temperature"
        )
        with gr.Accordion("More sampling", open=False):
            self.top_p = gr.Slider(
                0.01, 1, value=0.95, step=0.01, label="Top p", elem_id=f"{elem_id}-top-p"
            )
            self.top_k = gr.Slider(
                0, 200, value=0, step=1, label="Top k (0: off)", elem_id=f"{elem_id}-top-k"
            )
            self.min_p = gr.Slider(
                0, 1, value=0, step=0.01, label="Min p", elem_id=f"{elem_id}-min-p"
            )
            self.repetition = gr.Slider(
                0.5, 2, value=1.1, step=0.05, label="Repetition penalty",
                elem_id=f"{elem_id}-repetition",
            )  # fmt: skip
        self.inputs: list[Any] = [
            self.model, self.adapter, self.scale, self.strategy, self.parameters,
            self.temperature, self.top_p, self.top_k, self.min_p, self.repetition,
        ]  # fmt: skip
        self._connect()

    def _connect(self) -> None:
        self._catalog.change(
            partial(_choose, first=self._first),
            [self._catalog, self.model, self.adapter, self.strategy],
            [self.model, self.adapter, self.strategy], **_QUIET,
        )  # fmt: skip
        self.model.input(
            lambda catalog, model: _adapters(catalog, model, ""), [self._catalog, self.model],
            self.adapter, **_QUIET,
        )  # fmt: skip
        self.adapter.change(
            lambda adapter: gr.Slider(visible=bool(adapter)), self.adapter, self.scale, **_QUIET
        )
        self.strategy.change(lambda: {}, None, self.parameters, **_QUIET)

    def _render_parameters(self, elem_id: str) -> None:
        @gr.render(inputs=[self.strategy, self._catalog], show_progress="hidden")
        def render(strategy: str | None, catalog: Catalog) -> None:
            for name, schema in parameters_of(catalog, strategy).items():
                control = _control(name, schema, f"{elem_id}-{name}")
                event = control.change if isinstance(control, gr.Dropdown) else control.input
                event(
                    partial(_set, name=name, schema=schema), [control, self.parameters],
                    self.parameters, **_QUIET,
                )  # fmt: skip


def read_arm(values: list[Any]) -> dict[str, Any]:
    """Return the request's fields of the values of `ArmControls.inputs`."""
    model, adapter, scale, strategy, parameters, temperature, top_p, top_k, min_p, repetition = (
        values
    )
    arm: dict[str, Any] = {
        "model": adapter or model, "temperature": temperature, "top_p": top_p,
        "top_k": int(top_k), "min_p": min_p, "repetition_penalty": repetition,
    }  # fmt: skip
    if adapter:
        arm["adapter_scale"] = scale
    if strategy:
        arm["decoding"] = {"strategy": strategy, **parameters}
    return arm


def describe_arm(arm: Mapping[str, Any]) -> str:
    """Return one line that names an arm for people."""
    decoding = dict(arm.get("decoding") or {})
    strategy = decoding.pop("strategy", "")
    details = [f"{name} {value}" for name, value in decoding.items()]
    parts = [arm["model"] or "no model", ", ".join(filter(None, [strategy, *details]))]
    for name, label, silent in _TOLD:
        if arm.get(name, silent) != silent:
            parts.append(f"{label} {arm[name]:g}")
    return SEPARATOR.join(filter(None, parts))


def _choose(
    catalog: Catalog, model: str | None, adapter: str, strategy: str | None, *, first: str | None
) -> tuple[gr.Dropdown, gr.Dropdown, gr.Dropdown]:
    """Offer what the server has; keep what was chosen if it is still there."""
    models, strategies = list(catalog["models"]), list(catalog["strategies"])
    kept = model if model in models else next(iter(models), None)
    wanted = (name for name in (strategy, first) if name in strategies)
    kept_strategy = next(wanted, catalog["default"])
    return (
        gr.Dropdown(choices=models, value=kept),
        _adapters(catalog, kept, adapter),
        gr.Dropdown(choices=strategies, value=kept_strategy),
    )


def _adapters(catalog: Catalog, model: str | None, adapter: str) -> gr.Dropdown:
    found = catalog["models"].get(model, [])
    choices = [(NO_ADAPTER, ""), *((short_name(item), item) for item in found)]
    return gr.Dropdown(choices=choices, value=adapter if adapter in found else "")


def _control(name: str, schema: dict[str, Any], elem_id: str) -> Any:
    """Make the control that a parameter's JSON Schema asks for."""
    kind, default = schema.get("type"), schema.get("default")
    common: dict[str, Any] = {
        "label": name, "info": schema.get("description"), "elem_id": elem_id, "value": default,
        "interactive": True,
    }  # fmt: skip
    if "enum" in schema:
        return gr.Dropdown(schema["enum"], **common)
    if kind == "boolean":
        return gr.Checkbox(**common)
    if kind in ("number", "integer"):
        low = schema.get("minimum", schema.get("exclusiveMinimum"))
        high = schema.get("maximum", schema.get("exclusiveMaximum"))
        step = 1 if kind == "integer" else 0.05
        if low is None or high is None or high - low > 1000:
            return gr.Number(precision=0 if kind == "integer" else None, **common)
        first = low + step if "exclusiveMinimum" in schema else low
        return gr.Slider(first, high, step=step, **common)
    if kind == "array":
        common["value"] = ", ".join(map(str, default or []))
        common["info"] = f"{common['info'] or ''} Numbers between commas."
    return gr.Textbox(**common)


def _set(value: Any, parameters: dict[str, Any], name: str, schema: dict[str, Any]) -> Any:
    """Take over a control's value; what is no number between commas goes to the server as it is."""
    if schema.get("type") == "array":
        parts = [part.strip() for part in str(value).split(",") if part.strip()]
        value = [int(part) if part.lstrip("-").isdecimal() else part for part in parts]
    return {**parameters, name: value}
