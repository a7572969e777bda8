"""The interface put together: a page of five tabs."""

from importlib import resources
from typing import Any

import gradio as gr

from client.api import ApiClient
from client.errors import RequestError
from serve.ui.catalog import EMPTY, Catalog, load_catalog
from serve.ui.chat import ChatTab
from serve.ui.compare import CompareTab
from serve.ui.experiments import ExperimentsTab
from serve.ui.inside import InsideTab
from serve.ui.markdown import code_css
from serve.ui.messages import render_problem
from serve.ui.server_tab import ServerTab

CONCURRENCY = 32
MAX_QUEUED = 256
_ICON = (
    '<link rel="icon" href="data:image/svg+xml,%3Csvg xmlns=\'http://www.w3.org/2000/svg\' '
    "viewBox='0 0 32 32'%3E%3Cpath d='M4 22h24l-4 5H8zM15 3v17H6zM17 8l9 12h-9z' "
    "fill='%2314b8a6'/%3E%3C/svg%3E\">"
)
_SANS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
_MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")


def build_ui(client: ApiClient) -> gr.Blocks:
    """Return the page.

    Args:
        client: of the server that it shows.
    """
    with gr.Blocks(title="Proa", analytics_enabled=False, fill_width=True) as page:
        catalog = gr.State(EMPTY)
        with gr.Row(elem_classes="bar"):
            gr.HTML("<h1>Proa</h1>")
        problem = gr.HTML(visible=False)
        with gr.Row(visible=False) as key_row:
            key = gr.Textbox(
                label="API key", value="", type="password", elem_id="api-key",
                info="This server wants one. It stays in this page and is gone when you leave.",
            )  # fmt: skip
        with gr.Tabs() as tabs:
            with gr.Tab("Chat", id="chat"):
                chat = ChatTab(client, catalog, key)
            with gr.Tab("Compare", id="compare"):
                compare = CompareTab(client, catalog, key)
            with gr.Tab("Inside", id="inside"):
                InsideTab(client, catalog, key)
            with gr.Tab("Experiments", id="experiments") as experiments_tab:
                experiments = ExperimentsTab(client, key)
            with gr.Tab("Server", id="server") as server_tab:
                server = ServerTab(client, catalog, key)

        async def refresh(current: Catalog, given: str) -> tuple[Any, ...]:
            try:
                found = await load_catalog(client, given)
            except RequestError as error:
                wants_key = error.status == 401
                return (
                    current,
                    gr.HTML(render_problem(str(error)), visible=True),
                    gr.Row(visible=wants_key),
                )
            return found, gr.HTML(visible=False), gr.Row(visible=bool(given))

        for event in (page.load, key.submit, key.blur):
            event(
                refresh, [catalog, key], [catalog, problem, key_row],
                show_progress="hidden", api_visibility="private",
            )  # fmt: skip
        chat.load(page)
        compare.load(page)
        server.load(page)
        server.follow(tabs, server_tab)
        experiments.follow(experiments_tab)
    page.queue(default_concurrency_limit=CONCURRENCY, max_size=MAX_QUEUED, api_open=False)
    return page


def page_settings() -> dict[str, Any]:
    """Return how the page looks and what of Gradio stays off, for whatever serves it."""
    theme = gr.themes.Base(
        primary_hue="teal", neutral_hue="slate", font=list(_SANS), font_mono=list(_MONO)
    ).set(body_text_color_subdued="*neutral_600", body_text_color_subdued_dark="*neutral_400")
    sheets = sorted(
        (file for file in resources.files("serve.ui").iterdir() if file.name.endswith(".css")),
        key=lambda file: file.name,
    )
    css = "\n".join(file.read_text(encoding="utf-8") for file in sheets)
    return {
        "theme": theme, "css": f"{css}\n{code_css()}", "head": _ICON, "footer_links": [],
        "run_history": False,
        "ssr_mode": False, "mcp_server": False, "enable_monitoring": False, "pwa": False,
        "allowed_paths": [], "max_file_size": 0,
    }  # fmt: skip
