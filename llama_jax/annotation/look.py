"""How the desk looks: its HTML, its style and its keys. Everything that a person or a model wrote is escaped."""

from html import escape

from llama_jax.annotation.forms import SIDES
from llama_jax.annotation.session import View

_LEADS = {
    "preference": "You will see two answers to each of your messages. Choose the one you prefer, and say how clearly.",
    "comparison": "You will see two answers to each prompt. Say which is better, or that they are about the same.",
    "safety": "You will see one answer at a time. Judge how safe and how helpful it is.",
}


def header_html(rater: str, view: View | None) -> str:
    """The line on top: who is here, how much is done."""
    if view is None:
        return "<header><b>Desk</b></header>"
    left = "" if view.left is None else f" · {view.left} left"
    if view.too_long:
        left += f" · {view.too_long} left out, too long for the model"
    return f'<header><b>Desk</b><span>{escape(rater)} · <i id="rated">{view.rated}</i> judged{left}</span></header>'


def gate_html(mode: str) -> str:
    """What is said to those who come in."""
    return f"<h1>Welcome</h1><p>{_LEADS[mode]}</p>"


def dialog_html(view: View) -> str:
    """The dialog so far, the open message last."""
    if view.phase == "done":
        return '<div class="done"><h1>That was all.</h1><p>Every prompt has been judged. Thank you.</p></div>'
    if not view.messages:
        if view.error:  # the next prompt of a list, which cannot be answered now
            return ""
        return '<div class="done"><h1>What would you like to ask?</h1><p>What is answered will appear below.</p></div>'
    turns = "".join(f'<div class="turn {m["role"]}"><div>{escape(m["content"])}</div></div>' for m in view.messages)
    return f'<div class="dialog">{turns}</div>'


def answers_html(view: View) -> str:
    """The answers side by side, as far as they have come."""
    error = f'<p class="error" role="alert">{escape(view.error)}</p>' if view.error else ""
    if view.phase not in ("answer", "rate"):
        return error
    growing = view.phase == "answer" and not view.error
    texts = view.texts or ("", "")
    cards = "".join(
        f'<article class="card{" growing" if growing else ""}" aria-label="Answer {side}" aria-busy="{str(growing).lower()}">'
        f"{f'<h3>{side}</h3>' if len(texts) > 1 else ''}<div>{escape(text) or ('' if growing else '<i>(an empty answer)</i>')}"
        "</div></article>"
        for side, text in zip(SIDES, texts)
    )
    return f'<div class="cards" data-shown="{escape(view.shown_id)}">{cards}</div>{error}'


CSS = """
.gradio-container { width: 100% !important; max-width: 1120px !important; margin: 0 auto !important;
  padding: 12px 20px 60px !important;
  box-sizing: border-box; }
.gradio-container main, .gradio-container .wrap, .gradio-container .contain, #room { width: 100%; }
#room, #judgement, #writing { gap: 10px; } .html-container { padding: 0 !important; }
.gradio-container .block, .gradio-container .form { border: 0; box-shadow: none; background: transparent;
  padding: 0 !important; overflow: visible !important; }
footer { display: none !important; }
header { display: flex; justify-content: space-between; padding: 10px 2px 12px;
  border-bottom: 1px solid var(--border-color-primary);  color: var(--body-text-color-subdued); font-size: .92rem; }
header b { color: var(--body-text-color); letter-spacing: -.01em; font-size: 1.05rem; } header i { font-style: normal; }
#gate { max-width: 440px; margin: 12vh auto 0; }
h1 { font-size: 1.7rem; letter-spacing: -.02em; margin: 0 0 .3em; } h2 { font-size: 1.02rem; margin: .2em 0; }
.done { text-align: center; padding: 9vh 0 3vh; } .done p, #gate p { color: var(--body-text-color-subdued); }
.dialog { display: flex; flex-direction: column; gap: 10px; padding: 18px 0 6px; max-height: 46vh; overflow-y: auto; }
.turn { display: flex; } .turn.user { justify-content: flex-end; } .turn.system { opacity: .7; }
.turn > div { max-width: 78%; padding: 10px 15px; border-radius: 16px; white-space: pre-wrap; overflow-wrap: anywhere;
  line-height: 1.55; background: var(--background-fill-secondary); border: 1px solid var(--border-color-primary); }
.turn.user > div { background: #3b6fd4; border-color: #3b6fd4; color: #fff; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(320px, 100%), 1fr)); gap: 16px; padding: 8px 0 2px; }
.card { border: 1px solid var(--border-color-primary); border-radius: 16px; padding: 14px 18px; min-height: 7.5rem;
  background: var(--background-fill-primary); box-shadow: 0 1px 3px rgb(20 30 60 / 6%); }
.card h3 { margin: 0 0 6px; font-size: .86rem; color: #3b6fd4; } .dark .card h3 { color: #86acf5; }
.card > div { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.6; max-height: 42vh; overflow-y: auto; }
.card.growing > div::after { content: ""; display: inline-block; width: 8px; height: 1em; vertical-align: -2px;
  margin-left: 3px;  border-radius: 2px; background: #3b6fd4; animation: blink 1.1s infinite; }
@keyframes blink { 50% { opacity: .15; } }
@media (prefers-reduced-motion: reduce) { .card.growing > div::after { animation: none; } }
.error { color: #b23a3a; padding: 6px 0; }
#choice .wrap, #bins .wrap { display: grid; gap: 8px; counter-reset: key; }
#choice.choice-preference .wrap { grid-template-columns: repeat(8, 1fr); }
#choice.choice-comparison .wrap { grid-template-columns: repeat(7, 1fr); }
#bins .wrap { grid-template-columns: repeat(3, 1fr); }
#choice label, #bins label { counter-increment: key; position: relative; flex-direction: column; align-items: flex-start;
  justify-content: flex-end; min-height: 4.6rem; padding: 24px 10px 10px; border-radius: 12px; cursor: pointer;
  font-size: .86rem; line-height: 1.25; border: 1px solid var(--border-color-primary); box-shadow: none;
  background: var(--background-fill-primary); }
#choice.choice-safety label { min-height: 0; padding: 12px 14px; } #bins label { min-height: 3.8rem; }
#choice label span, #bins label span { margin: 0; }
#choice label input, #bins label input { position: absolute; opacity: 0; }
#choice label::before, #bins label::before { content: counter(key); position: absolute; top: 6px; left: 10px; font-size: .7rem;
  color: var(--body-text-color-subdued); font-variant-numeric: tabular-nums; }
#choice.choice-safety label::before { content: none; } #bins label::before { content: counter(key, lower-alpha); }
#choice label:hover, #bins label:hover { border-color: #3b6fd4; }
#choice label:has(:checked), #bins label:has(:checked) { border-color: #3b6fd4; background: #3b6fd4; color: #fff; }
#choice label:has(:checked)::before, #bins label:has(:checked)::before { color: #dbe6ff; }
#choice label:has(:focus-visible), #bins label:has(:focus-visible) { outline: 3px solid #86acf5; outline-offset: 2px; }
#decide, #stuck, #writing .row { justify-content: flex-end; padding-top: 4px; }
#skip, #submit, #leave, #again, #ask, #fresh, #begin { flex: 0 0 auto; min-width: 8rem; border-radius: 12px; font-size: .95rem;
  box-shadow: none; }
#submit, #again, #ask, #begin { background: #3b6fd4; color: #fff; }
#submit:hover, #again:hover, #ask:hover, #begin:hover { background: #2f5fbf; }
#writing { max-width: 760px; margin: 0 auto; width: 100%; padding-top: 10px; }
#message textarea, #name input, #name textarea { border: 1px solid var(--border-color-primary); border-radius: 12px;
  background: var(--background-fill-primary); padding: 12px 14px; line-height: 1.5; }
#message textarea:focus, #name input:focus { border-color: #3b6fd4; outline: 3px solid #86acf555; }
#track label { border: 1px solid var(--border-color-primary); border-radius: 99px; padding: 5px 14px; font-size: .86rem;
  background: none; box-shadow: none; }
#track label input { position: absolute; opacity: 0; } #track label span { margin: 0; }
#track label:has(:checked) { border-color: #3b6fd4; color: #3b6fd4; font-weight: 600; }
#track label:has(:focus-visible) { outline: 3px solid #86acf5; outline-offset: 2px; }
@media (max-width: 860px) { #choice.choice-preference .wrap { grid-template-columns: repeat(4, 1fr); }
  #choice.choice-comparison .wrap, #bins .wrap { grid-template-columns: 1fr; }
  #choice.choice-comparison label { min-height: 0; } }
"""

# Enter sends a message (with Shift it begins a line); outside of texts digits choose, letters tell what is safe, Enter submits.
HEAD = """
<script>
addEventListener("keydown", event => {
  const click = id => { const b = document.querySelector(id); if (b && b.offsetParent) { event.preventDefault(); b.click(); } };
  const text = event.target.matches("textarea, input[type=text], input[type=password]");
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
  if (text) { if (event.key === "Enter" && !event.shiftKey && event.target.closest("#message")) click("#ask"); return; }
  if (event.key === "Enter" && !event.target.closest("button")) return click("#submit");
  const choose = (group, key, place) => {
    const inputs = [...document.querySelectorAll(group + " input[type=radio]")];
    const found = inputs.find(input => input.value === key) || inputs[place];
    if (found && found.offsetParent) { event.preventDefault(); found.click(); found.focus(); }
  };
  if (/^[1-9]$/.test(event.key)) choose("#choice", event.key, event.key - 1);
  if (/^[abc]$/.test(event.key)) choose("#bins", event.key, "abc".indexOf(event.key));
});
// What comes next gets the keys: the message that is to be written, or the choice.
const watch = () => new MutationObserver(() => {
  const field = document.querySelector("#message textarea");
  const busy = document.activeElement && document.activeElement !== document.body;
  if (field && field.offsetParent && !busy) field.focus();
}).observe(document.body, {childList: true, subtree: true, attributeFilter: ["class", "style"]});
document.body ? watch() : addEventListener("DOMContentLoaded", watch);
</script>
"""
