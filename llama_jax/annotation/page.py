"""The desk's page: Gradio components over a `Session`, and nothing else (extra [web]). Nothing is fetched from outside."""

import collections
import hmac
import os
from collections.abc import Iterator, Mapping
from typing import Any

from llama_jax.annotation import forms
from llama_jax.annotation.look import CSS, HEAD, answers_html, dialog_html, gate_html, header_html
from llama_jax.annotation.session import Desk, Session, StaleError, View, rater_name
from llama_jax.annotation.tasks import Settings

_TRACKS = ("Helpfulness", "Safety")


def require() -> Any:
    """Gradio, with its telemetry off; or the error that names the extra."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
        import prometheus_client  # noqa: F401 - of the workers
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"the desk needs the package {error.name}: pip install 'llama_jax[web]'") from None
    return gradio


def serve(
    desk: Desk, *, host: str, port: int, password: str = "", passwords: Mapping[str, str] | None = None, wait: bool = True
) -> Any:
    """Listens until interrupted, or in the background; with a password people log in, and their login is their name.

    `passwords` has one for each rater, so that nobody can be another one; `password` is shared by all.
    """
    gr = require()
    login = bool(password or passwords)
    page = build(desk, login=login)

    def enter(name: str, given: str) -> bool:
        try:
            expected = passwords.get(rater_name(name), "") if passwords else password
        except ValueError:
            return False
        if not expected or not hmac.compare_digest(given.strip().encode(), expected.strip().encode()):
            return False
        try:
            desk.session(name)
        except ValueError:  # no name, or not among the raters
            return False
        return True

    font = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "DejaVu Sans", "sans-serif"]
    theme = gr.themes.Base(primary_hue="blue", neutral_hue="slate", radius_size="lg", font=font, font_mono=["monospace"])
    page.queue(default_concurrency_limit=None)
    page.launch(
        server_name=host, server_port=port, auth=enter if login else None,
        auth_message="Your name and password" if passwords else "Your name, and the desk's password",
        prevent_thread_lock=not wait, share=False, inbrowser=False, ssr_mode=False, mcp_server=False, enable_monitoring=False,
        footer_links=[], theme=theme, css=CSS, head=HEAD, quiet=not wait,
    )  # fmt: skip
    return page


# The components that events change, in the order of what `render` gives, and those that are only read or pressed.
_CHANGED = (
    "name_here", "shown_id", "header", "gate", "room", "dialog", "answers", "judgement", "choice", "safe", "stuck", "leave",
    "writing", "fresh", "message", "track",
)  # fmt: skip
Parts = collections.namedtuple("Parts", (*_CHANGED, "remembered", "name", "begin", "skip", "submit", "again", "ask"))


def build(desk: Desk, *, login: bool) -> Any:
    """The page as Gradio blocks; `login`: who the rater is comes from the login, never from the browser."""
    gr = require()
    with gr.Blocks(title="Desk", analytics_enabled=False) as page:
        _wire(gr, page, _layout(gr, desk.settings, login=login), desk, login=login)
    return page


def _layout(gr: Any, settings: Settings, *, login: bool) -> Parts:
    """What stands on the page, from top to bottom."""
    mode = settings.mode
    name_here, shown_id = gr.State(""), gr.State("")
    remembered = gr.BrowserState("", storage_key="llama_jax_rater", secret="a name, no secret")
    header = gr.HTML(header_html("", None))
    with gr.Column(elem_id="gate", visible=not login) as gate:
        gr.HTML(gate_html(mode))
        name = gr.Textbox(label="Your name", placeholder="as it shall stand beside your judgements", elem_id="name")
        begin = gr.Button("Begin", variant="primary", elem_id="begin")
    with gr.Column(elem_id="room", visible=False) as room:
        dialog, answers = gr.HTML(elem_id="dialog"), gr.HTML(elem_id="answers")
        with gr.Column(elem_id="judgement", visible=False) as judgement:
            gr.HTML(f"<h2>{forms.QUESTIONS[mode]}</h2>")
            choices, style = list(forms.CHOICES[mode]), [f"choice-{mode}"]
            choice = gr.Radio(choices, show_label=False, elem_id="choice", elem_classes=style)
            bins = [(words, value) for value, words in forms.BIN_WORDS.items()]
            safe = gr.Radio(bins, label="Are they safe?", elem_id="bins", visible=False)
            with gr.Row(elem_id="decide"):
                skip = gr.Button("Skip", elem_id="skip")
                submit = gr.Button("Submit", variant="primary", elem_id="submit")
        with gr.Row(elem_id="stuck", visible=False) as stuck:
            leave = gr.Button("Skip", elem_id="leave")
            again = gr.Button("Try again", variant="primary", elem_id="again")
        with gr.Column(elem_id="writing", visible=False) as writing:
            message = gr.Textbox(show_label=False, lines=3, elem_id="message", placeholder="Write a message …")
            track = gr.Radio(_TRACKS, value=_TRACKS[settings.safety_track], show_label=False, elem_id="track",
                             visible=mode == "preference")  # fmt: skip
            with gr.Row():
                fresh = gr.Button("New dialog", elem_id="fresh", visible=False)
                ask = gr.Button("Ask", variant="primary", elem_id="ask")
    return Parts(
        name_here, shown_id, header, gate, room, dialog, answers, judgement, choice, safe, stuck, leave, writing, fresh,
        message, track, remembered, name, begin, skip, submit, again, ask,
    )  # fmt: skip


def _wire(gr: Any, page: Any, on: Parts, desk: Desk, *, login: bool) -> None:
    """What happens on the page, at each event of its components."""
    mode, outputs = desk.settings.mode, list(on[: len(_CHANGED)])

    def render(session: Session, view: View, *, first: bool, written: bool) -> tuple:
        """`first` of a stream: only then choices are set, since the last one is sent twice, after the rater may have
        chosen. `written`: likewise the message; else it stays as it stands in the browser."""
        chosen, is_safe = ({"value": value} if first else {} for value in (view.choice, view.safety_bin))
        return (
            session.rater, view.shown_id, header_html(session.rater, view), gr.update(visible=False),
            gr.update(visible=True), dialog_html(view), answers_html(view), gr.update(visible=view.phase == "rate"),
            gr.update(**chosen), gr.update(visible=mode == "preference" and view.is_safety, **is_safe),
            gr.update(visible=bool(view.error)), gr.update(visible=view.phase == "answer"),
            gr.update(visible=view.phase == "write" and not view.error), gr.update(visible=bool(view.messages)),
            view.draft if first and written else gr.skip(),
            _TRACKS[view.is_safety] if view.phase == "write" else gr.skip(),
        )  # fmt: skip

    def follow(session: Session, *, written: bool) -> Iterator[tuple]:
        for number, view in enumerate(session.stream()):
            yield render(session, view, first=number == 0, written=written)

    def unchanged() -> tuple:
        return tuple(gr.skip() for _ in outputs)

    def who(given: str, request: Any) -> Session:
        return desk.session(request.username if login else given or "")

    def act(given: str, request: Any, action: Any, *, written: bool = False) -> Iterator[tuple]:
        """Carries out what the rater did, and shows what follows; what cannot be done is said and changes nothing, but a window
        that is behind is brought up to date."""
        try:
            session = who(given, request)
            action(session)
        except StaleError as error:
            gr.Warning(str(error))
            written = False
        except ValueError as error:
            gr.Warning(str(error))
            yield unchanged()
            return
        yield from follow(session, written=written)

    def on_load(given: str, request: gr.Request) -> Iterator[tuple]:
        if given or login:
            yield from act(given, request, lambda session: session.begin(), written=True)
        else:
            yield unchanged()

    def on_enter(given: str, request: gr.Request) -> Iterator[tuple]:
        yield from act(given, request, lambda session: session.begin(), written=True)

    def on_ask(given: str, text: str, of_track: str, request: gr.Request) -> Iterator[tuple]:
        is_safety = of_track == _TRACKS[1] if mode == "preference" else None
        yield from act(given, request, lambda session: session.ask(text, is_safety=is_safety), written=True)

    def on_rate(given: str, shown: str, value: str, of_bins: str, request: gr.Request) -> Iterator[tuple]:
        yield from act(given, request, lambda session: session.rate(shown, value, of_bins))

    def on_skip(given: str, shown: str, request: gr.Request) -> Iterator[tuple]:
        yield from act(given, request, lambda session: session.skip(shown))

    def on_fresh(given: str, request: gr.Request) -> Iterator[tuple]:
        yield from act(given, request, lambda session: session.new_dialog())

    def on_write(given: str, text: str, request: gr.Request) -> None:
        if given:
            who(given, request).keep_draft(text)

    def on_choose(given: str, shown: str, value: str, of_bins: str, request: gr.Request) -> None:
        if given:
            who(given, request).keep_choice(shown, value, of_bins)

    how = {"outputs": outputs, "api_visibility": "private", "show_progress": "hidden", "concurrency_limit": None}
    page.load(on_load, [on.remembered], **how)
    for event in (on.begin.click, on.name.submit):
        # In the browser, and first: a page that is reloaded while the first answers grow knows its rater, too.
        event(None, [on.name], [on.remembered], js="name => name.trim()", api_visibility="private")
        event(on_enter, [on.name], **how)
    on.again.click(on_enter, [on.name_here], **how)
    on.leave.click(on_skip, [on.name_here, on.shown_id], **how)
    on.ask.click(on_ask, [on.name_here, on.message, on.track], **how)
    on.submit.click(on_rate, [on.name_here, on.shown_id, on.choice, on.safe], **how)
    on.skip.click(on_skip, [on.name_here, on.shown_id], **how)
    on.fresh.click(on_fresh, [on.name_here], **how)
    silent = {**how, "outputs": None, "trigger_mode": "always_last"}  # what is not sent yet survives a reload, too
    on.message.input(on_write, [on.name_here, on.message], **silent)
    for field in (on.choice, on.safe):
        field.input(on_choose, [on.name_here, on.shown_id, on.choice, on.safe], **silent)
