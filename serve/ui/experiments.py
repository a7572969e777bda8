"""The Experiments tab: what a server tries out, and what has come of it so far."""

from typing import Any
from urllib.parse import quote

import gradio as gr

from client.api import ApiClient
from client.errors import RequestError
from serve.ui.controls import PRIVATE
from serve.ui.experiments_view import NOTHING_RUNS, render_report
from serve.ui.messages import render_problem


class ExperimentsTab:
    """Components of the tab and what they do.

    Args:
        client: of the server.
        key: the API key's field.
    """

    def __init__(self, client: ApiClient, key: gr.Textbox) -> None:
        self._client, self._key = client, key
        self._names = gr.State([])
        with gr.Row(elem_classes="server-heading"):
            self._name = gr.Dropdown(
                [], label="Experiment", elem_id="experiments-name", interactive=True
            )
            refresh = gr.Button("Refresh", size="sm", elem_id="experiments-refresh", min_width=90)
        self._report = gr.HTML(
            NOTHING_RUNS, elem_id="experiments-report", elem_classes="flush",
            apply_default_css=False, js_on_load=None,
        )  # fmt: skip
        self._inputs = [key, self._name, self._names]
        self._outputs = [self._name, self._names, self._report]
        refresh.click(self._show, self._inputs, self._outputs, **PRIVATE)
        self._name.input(self._show, self._inputs, self._outputs, **PRIVATE)

    def follow(self, tab: gr.Tab) -> None:
        """Ask the server whenever this tab is selected."""
        tab.select(self._show, self._inputs, self._outputs, **PRIVATE)

    async def _show(self, key: str, name: str | None, names: list[str]) -> tuple[Any, ...]:
        try:
            entries = await self._client.entries("/v1/experiments", key=key)
            found = [str(entry["id"]) for entry in entries]
            if not found:
                return gr.Dropdown(choices=[], value=None), [], NOTHING_RUNS
            chosen = name if name in found else found[0]
            report = await self._client.request(
                "GET", f"/v1/experiments/{quote(chosen, safe='')}", key=key
            )
        except RequestError as error:
            if error.status == 404:
                return gr.Dropdown(choices=[], value=None), [], NOTHING_RUNS
            return gr.skip(), names, render_problem(str(error))
        dropdown = (
            gr.skip()
            if (found, chosen) == (names, name)
            else gr.Dropdown(choices=found, value=chosen)
        )
        return dropdown, found, render_report(report)
