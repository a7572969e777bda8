"""The Server tab: what is attached, attaching and detaching, and what the server does now."""

import time
from typing import Any
from urllib.parse import quote

import gradio as gr

from client.api import ApiClient
from client.errors import RequestError
from serve.ui.catalog import Catalog, load_catalog
from serve.ui.controls import PRIVATE
from serve.ui.messages import render_message
from serve.ui.metrics import Sample, keep_recent, parse_metrics
from serve.ui.server_view import render_adapters, render_live

POLL_S = 2.0


class ServerTab:
    """Components of the tab and what they do.

    Args:
        client: of the server.
        catalog: of the session; renewed after attaching and detaching.
        key: the API key's field.
    """

    def __init__(self, client: ApiClient, catalog: gr.State, key: gr.Textbox) -> None:
        self._client, self._catalog, self._key = client, catalog, key
        # Samples of the metrics, and names of what is attached.
        self._samples, self._names = gr.State([]), gr.State([])
        self._timer = gr.Timer(POLL_S, active=False)
        self._live = _html("server-live", render_live([]))
        with gr.Row(elem_classes="server-heading"):
            gr.HTML("<h2>Adapters and variants</h2>", elem_classes="flush", apply_default_css=False)
            refresh = gr.Button("Refresh", size="sm", elem_id="server-refresh", min_width=90)
        self._table = _html("server-table", render_adapters([]))
        with gr.Accordion("Attach and detach", open=True):
            self._admin_key = gr.Textbox(
                label="Admin key", type="password", value="", elem_id="server-admin-key",
                info="Both need it. It stays in this page and is gone when you leave.",
            )  # fmt: skip
            with gr.Row(elem_classes="server-forms"):
                with gr.Column(min_width=280):
                    self._name = gr.Textbox(
                        label="Name", value="", elem_id="server-attach-name",
                        info="Letters, digits, '.', '_' and '-'.",
                    )  # fmt: skip
                    self._path = gr.Textbox(
                        label="Folder", value="", elem_id="server-attach-path",
                        info="Below the server's adapter root.",
                    )  # fmt: skip
                    attach = gr.Button("Attach", variant="primary", elem_id="server-attach")
                with gr.Column(min_width=280):
                    self._detached = gr.Dropdown(
                        [], label="Attached", elem_id="server-detach-name", interactive=True,
                        info="Only what no request uses can be detached.",
                    )  # fmt: skip
                    detach = gr.Button("Detach", variant="stop", elem_id="server-detach")
            self._message = _html("server-message", "")
        self._connect(refresh, attach, detach)

    def _connect(self, refresh: gr.Button, attach: gr.Button, detach: gr.Button) -> None:
        polled = [self._key, self._samples, self._names]
        self._shown = [self._live, self._table, self._detached, self._samples, self._names]
        self._timer.tick(self._poll, polled, self._shown, trigger_mode="once", **PRIVATE)
        refresh.click(self._poll, polled, self._shown, **PRIVATE)
        changed = [
            self._message, self._table, self._detached, self._names, self._catalog, self._name,
            self._path,
        ]  # fmt: skip
        keys = [self._key, self._admin_key, self._catalog]
        for event in (attach.click, self._path.submit, self._name.submit):
            event(self._attach, [*keys, self._name, self._path], changed, **PRIVATE)
        detach.click(self._detach, [*keys, self._detached], changed, **PRIVATE)

    def load(self, page: gr.Blocks) -> None:
        """Show what is attached when the page opens."""
        polled = [self._key, self._samples, self._names]
        page.load(self._poll, polled, self._shown, **PRIVATE)

    def follow(self, tabs: gr.Tabs, tab: gr.Tab) -> None:
        """Ask for metrics only while this tab is the selected one.

        Args:
            tabs: all of them.
            tab: this one.
        """

        def make_active(event: gr.SelectData) -> gr.Timer:
            return gr.Timer(active=event.value == tab.label)

        tabs.select(make_active, None, self._timer, queue=False, **PRIVATE)
        polled = [self._key, self._samples, self._names]
        tab.select(self._poll, polled, self._shown, **PRIVATE)

    async def _poll(self, key: str, samples: list[Sample], names: list[str]) -> tuple[Any, ...]:
        problem = ""
        try:
            sums = parse_metrics(await self._client.text("/metrics", key=key))
        except RequestError as error:
            sums, problem = None, str(error)
        samples = keep_recent(samples, Sample(time_s=time.monotonic(), sums=sums))
        live = render_live(samples, problem)
        try:
            entries = await self._load_adapters(key)
        except RequestError:
            # The table stays as it was; the tiles say what is wrong.
            return live, gr.skip(), gr.skip(), samples, names
        found = _names(entries)
        dropdown = gr.skip() if found == names else gr.Dropdown(choices=found)
        return live, render_adapters(entries), dropdown, samples, found

    async def _attach(
        self, key: str, admin_key: str, catalog: Catalog, name: str, path: str
    ) -> tuple[Any, ...]:
        if not name.strip() or not path.strip():
            return _refused("Attaching needs a name and a folder.")
        body = {"name": name.strip(), "path": path.strip()}
        try:
            await self._client.request("POST", "/v1/adapters", key=admin_key or key, body=body)
        except RequestError as error:
            return _refused(f"Not attached: {error}")
        shown = await self._changed(admin_key or key, catalog)
        return render_message(f"Attached {name.strip()}."), *shown, "", ""

    async def _detach(
        self, key: str, admin_key: str, catalog: Catalog, name: str | None
    ) -> tuple[Any, ...]:
        if not name:
            return _refused("Choose what to detach.")
        try:
            await self._client.request(
                "DELETE", f"/v1/adapters/{quote(name, safe='')}", key=admin_key or key
            )
        except RequestError as error:
            return _refused(f"Not detached: {error}")
        shown = await self._changed(admin_key or key, catalog)
        return render_message(f"Detached {name}."), *shown, gr.skip(), gr.skip()

    async def _changed(self, key: str, catalog: Catalog) -> tuple[Any, ...]:
        """Return what the page shows of a server whose adapters are others now."""
        try:
            entries = await self._load_adapters(key)
            catalog = await load_catalog(self._client, key)
        except RequestError:
            return gr.skip(), gr.skip(), gr.skip(), catalog
        found = _names(entries)
        return render_adapters(entries), gr.Dropdown(choices=found, value=None), found, catalog

    async def _load_adapters(self, key: str) -> list[dict[str, Any]]:
        return await self._client.entries("/v1/adapters", key=key)


def _html(elem_id: str, value: str) -> gr.HTML:
    return gr.HTML(
        value, elem_id=elem_id, elem_classes="flush", apply_default_css=False, js_on_load=None
    )


def _names(entries: list[dict[str, Any]]) -> list[str]:
    return [entry["name"] for entry in entries]


def _refused(text: str) -> tuple[Any, ...]:
    return render_message(text, is_problem=True), *[gr.skip()] * 6
