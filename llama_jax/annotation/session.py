"""The desk without its page: raters, dialogs, blinding, and what is kept, so that neither a reload nor a kill loses anything.

Rows go to the output as they are given. Beside it, in `<output>.desk/`, lies one file a rater with the dialog that is open,
written whole at each step, and `answers.jsonl` with the answers that all raters of a prompt list share.
"""

import dataclasses
import datetime
import functools
import hashlib
import json
import os
import random
import secrets
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from llama_jax.annotation import forms
from llama_jax.annotation.drawing import Answerer, Draw, Pair
from llama_jax.annotation.forms import Record, Shown
from llama_jax.annotation.tasks import Settings, Task, check_rows, identity, judged, own_prompt, tasks_of
from llama_jax.data.dialog import Message, check_messages
from llama_jax.data.row_file import RowFile
from llama_jax.files import write_json

_LONGEST_FILE = 150  # characters of a file's name that a rater's may have
_PAUSE = 0.05  # seconds at least between two looks at answers that grow: raters share the interpreter with the engines


class StaleError(ValueError):
    """What a window shows is no longer so: the same rater went on in another one."""


def rater_name(text: str) -> str:
    """A rater's name as it is stored: composed, without spaces around it. ValueError for what is none."""
    name = unicodedata.normalize("NFC", text).strip()
    letters = [c for c in name if unicodedata.category(c)[0] in "LMN" or c in "_ .@-'\u2019"]  # with their marks
    if not 1 <= len(name) <= 40 or len(letters) < len(name) or unicodedata.category(name[0])[0] not in "LN":
        raise ValueError("A name has 1 to 40 letters, digits, spaces, dots, apostrophes or dashes, and begins with a letter.")
    return name


@dataclasses.dataclass(frozen=True)
class View:
    """What the page shows of a session: phase is "write", "answer", "rate" or "done".

    `is_safety` is the track: of the answers that are shown, or of the message before the one to be written.
    """

    phase: str
    messages: tuple[Message, ...]
    texts: tuple[str, ...] = ()
    shown_id: str = ""
    is_safety: bool = False
    rated: int = 0
    left: int | None = None  # prompts of the list that this rater has not judged; None without a list
    too_long: int = 0  # prompts of the list that nobody is shown, since they do not fit
    error: str = ""
    draft: str = ""  # the message that the rater is writing
    choice: str | None = None  # what is chosen of the answers that are shown, and not submitted
    safety_bin: str | None = None


class Desk:
    """All sessions over one output file."""

    def __init__(
        self, output: str | os.PathLike, settings: Settings, answerer: Answerer, *, prompts: Sequence[Mapping[str, Any]] = (),
        chance: Callable[[], random.Random] = random.SystemRandom,
    ):  # fmt: skip
        """Opens the output, with what is in it; `prompts` are rows of `read_prompt_list`. Raises ValueError for wrong files."""
        self.settings, self.answerer, self.chance = settings, answerer, chance
        self.output = RowFile(output)
        check_rows(self.output.rows, settings, str(output))
        self.directory = Path(f"{output}.desk")
        self.shared = RowFile(self.directory / "answers.jsonl")
        self.listed = [task for row in prompts for task in tasks_of(row, settings)]
        self._sessions: dict[str, Session] = {}
        self._lock = threading.RLock()

    @functools.cached_property
    def tasks(self) -> list[Task]:
        """What is listed and fits the context of each model of the desk, so that all are judged on the same prompts; looked at
        once, when the models are there."""
        return [task for task in self.listed if all(self.answerer.fits(name, task.messages) for name in self.settings.models)]

    @property
    def too_long(self) -> int:
        """How many of the list nobody is shown."""
        return len(self.listed) - len(self.tasks)

    def session(self, rater: str) -> "Session":
        """The session of a rater, as it was left; ValueError for a name that is none."""
        rater = rater_name(rater)
        if self.settings.raters and rater not in self.settings.raters:
            raise ValueError(f"{rater} is not among the raters of this desk.")
        with self._lock:
            if rater not in self._sessions:
                self._sessions[rater] = Session(self, rater)
            return self._sessions[rater]

    def known_answers(self, prompt_id: str, models: Sequence[str]) -> dict[str, tuple]:
        """What these models answered to a prompt of the list before, for another rater: `texts` and `ended`; {} if unknown."""
        found = {row["model"]: row for row in self.shared.rows if row["prompt_id"] == prompt_id}
        if not found.keys() >= set(models):
            return {}
        return {of: tuple(found[name][key] for name in models) for of, key in (("texts", "answer"), ("ended", "ended"))}

    def remember(self, shown: Shown) -> None:
        """Keeps the answers of a prompt of the list for the other raters, unless they are known."""
        with self._lock:
            for model, text, ended in zip(shown.models, shown.texts, shown.ended):
                if not self.known_answers(shown.prompt_id, [model]):
                    self.shared.append({"prompt_id": shown.prompt_id, "model": model, "answer": text, "ended": ended})

    def close(self) -> None:
        """Stops what is being drawn and closes the files."""
        for session in self._sessions.values():
            session.close()
        self.output.close()
        self.shared.close()


class Session:
    """One rater's place at the desk. All methods may be called from several threads (and windows)."""

    def __init__(self, desk: Desk, rater: str):
        self.desk, self.rater, self.settings = desk, rater, desk.settings
        name = quote(rater, safe="")
        if len(name) > _LONGEST_FILE:  # of letters that are no Latin ones
            name = hashlib.sha256(name.encode()).hexdigest()
        self._path = desk.directory / f"{name}.json"
        self._lock = threading.RLock()
        self._pair: Pair | None = None
        self._error = ""
        self._messages: tuple[Message, ...] = ()
        self._shown: Shown | None = None
        self._models: tuple[str, ...] = ()  # that answered last
        self._draft = ""
        self._picked: tuple[str, str | None, str | None] = ("", None, None)  # id of what is shown, choice, what is safe
        rows = [row for row in desk.output.rows if row.get("rater") == rater]
        self._rated = len(rows)
        self._judged = {judged(row, desk.settings) for row in rows}
        self._order: list[Task] | None = None
        self._open: tuple[int, list[Task]] = (-1, [])  # how much was judged then, and what was open
        self._restore({row.get("shown_id"): row for row in rows})

    # ---- what the page calls ----

    def view(self) -> View:
        """What to show now."""
        with self._lock:
            left = None if not self.desk.listed else len(self._open_tasks())
            shared = {"rated": self._rated, "left": left, "too_long": self.desk.too_long, "error": self._error,
                      "draft": self._draft}  # fmt: skip
            if self._shown is None:
                phase = "done" if left == 0 and not self._messages else "write"
                return View(phase, self._messages, is_safety=self._track, **shared)
            shown = self._shown
            texts = shown.texts if shown.texts is not None else self._growing(shown)
            if self._pair and self._pair.error:
                shared["error"] = self._pair.error
            if self._picked[0] == shown.id:
                _, shared["choice"], shared["safety_bin"] = self._picked
            phase = "rate" if shown.texts is not None else "answer"
            return View(phase, shown.messages, texts, shown.id, shown.is_safety, **shared)

    def begin(self) -> None:
        """Goes on where the session was left: takes the next prompt of the list, or draws again what a kill interrupted.

        If that cannot be now, the view says why: what the rater did before is stored, and no error of that.
        """
        with self._lock:
            self._error = ""
            try:
                if self._shown is None and not self._messages and (tasks := self._open_tasks()):
                    self._show(tasks[0])
                elif self._shown is not None and self._shown.texts is None and (self._pair is None or self._pair.error):
                    self._draw()
            except ValueError as error:
                self._error = str(error)

    def ask(self, text: str, *, is_safety: bool | None = None) -> None:
        """The rater's next message; ValueError if it cannot be asked, StaleError while answers wait to be judged."""
        with self._lock:
            if self._shown is not None:
                raise StaleError("Judge the answers first.")
            if not text.strip():
                raise ValueError("Write a message first.")
            messages = (*self._messages, {"role": "user", "content": text.strip()})
            check_messages(messages, "The message")
            self._track = self._track if is_safety is None else is_safety
            before = self._models if self._messages else ()
            self._show(
                own_prompt(messages, self.settings, is_safety=self._track, before=before, chance=self.desk.chance())
            )
            self._draft = ""
            self._save()

    def keep_draft(self, text: str) -> None:
        """Keeps a message that is being written; one that comes late, after it was asked, is none."""
        with self._lock:
            if self._shown is None:
                self._draft = text
                self._save()

    def keep_choice(self, shown_id: str, choice: str | None, safety_bin: str | None) -> None:
        """Keeps what is chosen and not yet submitted, as far as it still stands."""
        with self._lock:
            if self._shown is not None and self._shown.id == shown_id:
                self._picked = (shown_id, choice, safety_bin)
                self._save()

    def stream(self, seconds: float = 0.2) -> Iterator[View]:
        """Views while the answers grow, ending with the one in which they are complete."""
        while True:
            view = self.view()
            pair = self._pair
            yield view
            if view.phase != "answer" or pair is None or pair.error:
                return
            pair.wait(seconds)
            time.sleep(_PAUSE)

    def rate(self, shown_id: str, choice: str | None, safety_bin: str | None = None) -> dict[str, Any]:
        """Stores a judgement and goes on; returns its row. ValueError, with words for the rater, if it cannot be stored."""
        with self._lock:
            shown = self._require(shown_id)
            record = Record(self.rater, _now(), self.settings.source, self.settings.batch)
            row = forms.row(shown, self.settings.mode, choice, safety_bin, record) | {"shown_id": shown.id}
            self.desk.output.append(row)
            self._rated += 1
            self._judged.add(identity(shown))
            self._advance(forms.continuation(shown, row))
            return row

    def skip(self, shown_id: str) -> None:
        """Leaves a pair without a judgement; a prompt of the list counts as seen."""
        with self._lock:
            shown = self._require(shown_id)
            if self._pair:
                self._pair.stop()
            if shown.prompt_id:
                self._judged.add(identity(shown))
                self._skipped.append(list(identity(shown)))
            self._shown, self._pair = None, None
            self._messages = shown.messages[:-1] if not shown.prompt_id else ()
            self._save()
            self.begin()

    def new_dialog(self) -> None:
        """Ends the dialog; StaleError while answers wait to be judged."""
        with self._lock:
            if self._shown is not None:
                raise StaleError("Judge the answers first, or skip them.")
            self._messages = ()
            self._save()
            self.begin()

    def close(self) -> None:
        """Stops what is being drawn."""
        if self._pair:
            self._pair.stop()

    # ---- inside ----

    def _require(self, shown_id: str) -> Shown:
        if self._shown is None or self._shown.id != shown_id:
            raise StaleError("This was judged already, in another window.")
        return self._shown

    def _growing(self, shown: Shown) -> tuple[str, ...]:
        """What there is of answers that are being drawn. Of different models both are as long as the shorter one: the faster
        would be known by its speed."""
        texts = self._pair.texts if self._pair else ()
        if len(set(shown.models)) == 1:
            return texts
        shortest = min(map(len, texts), default=0)
        return tuple(text[:shortest] for text in texts)

    def _open_tasks(self) -> list[Task]:
        """Prompts of the list that this rater has not judged, in an order of the rater's own."""
        if self._order is None:
            self._order = list(self.desk.tasks)
            random.Random(self.rater).shuffle(self._order)
        if self._open[0] != len(self._judged):  # each look at growing answers asks, and what is judged is only added to
            self._open = len(self._judged), [task for task in self._order if identity(task) not in self._judged]
        return self._open[1]

    def _show(self, task: Task) -> None:
        """Fixes sides, temperatures and seed, keeps them, and only then begins to draw."""
        chance, models = self.desk.chance(), list(task.models)
        chance.shuffle(models)
        varied = self.settings.mode == "preference"
        temperatures = [chance.choice(self.settings.temperatures) if varied else self.settings.temperatures[0] for _ in models]
        self._seed = chance.getrandbits(31)
        before = self._shown, self._messages
        self._shown = Shown(
            secrets.token_hex(8), task.messages, tuple(models), tuple(temperatures), None, task.is_safety, task.prompt_id,
            task.category, task.risk,
        )  # fmt: skip
        try:
            self._draw()
        except Exception:  # the dialog is too long, or the model busy: nothing has happened
            self._shown, self._messages = before
            raise
        finally:
            self._save()

    def _draw(self) -> None:
        shown, self._pair = self._shown, None
        if self._shares(shown) and (known := self.desk.known_answers(shown.prompt_id, shown.models)):
            self._shown = dataclasses.replace(shown, **known)
            return
        draws = [
            Draw(model, shown.messages, temperature, self._seed, index)
            for index, (model, temperature) in enumerate(zip(shown.models, shown.temperatures))
        ]
        distinct, done = self.settings.mode == "preference", functools.partial(self._drawn, shown.id)
        self._pair = Pair(self.desk.answerer, draws, distinct=distinct, done=done).start()

    def _drawn(self, shown_id: str, texts: tuple[str, ...], ended: tuple[bool, ...]) -> None:
        with self._lock:
            if self._shown is None or self._shown.id != shown_id:
                return
            complete = dataclasses.replace(self._shown, texts=texts, ended=ended)
            if self._shares(complete):
                self.desk.remember(complete)
                complete = dataclasses.replace(complete, **self.desk.known_answers(complete.prompt_id, complete.models))
            self._shown = complete
            self._save()

    def _shares(self, shown: Shown) -> bool:
        """Whether all raters judge the same answers: those to a prompt of the list, when people evaluate models."""
        return bool(shown.prompt_id) and self.settings.mode != "preference"

    def _advance(self, chosen: str | None) -> None:
        """The chosen answer continues the dialog; without one, the next prompt begins."""
        shown = self._shown
        self._messages = () if chosen is None else (*shown.messages, {"role": "assistant", "content": chosen})
        self._shown, self._pair, self._models = None, None, shown.models
        self._save()
        if chosen is None:
            self.begin()

    def _save(self) -> None:
        write_json(self._path, {
            "rater": self.rater, "messages": list(self._messages), "seed": self._seed, "skipped": self._skipped,
            "track": self._track, "models": list(self._models), "draft": self._draft, "picked": list(self._picked),
            "shown": None if self._shown is None else forms.to_json(self._shown),
        })  # fmt: skip

    def _restore(self, stored: Mapping[str, Mapping[str, Any]]) -> None:
        """Reads the open dialog; a judgement that was stored just before a kill is not asked for again."""
        self._seed, self._skipped, self._track = 0, [], self.settings.safety_track
        if not self._path.exists():
            return
        values = json.loads(self._path.read_text(encoding="utf-8"))
        self._messages, self._seed, self._skipped = tuple(values["messages"]), values["seed"], values["skipped"]
        self._track, self._models, self._draft = values["track"], tuple(values["models"]), values["draft"]
        if not set(self._models) <= set(self.settings.models):  # the desk serves others now
            self._models = ()
        self._picked = tuple(values["picked"])
        self._judged |= {tuple(done) for done in self._skipped}
        if values["shown"] is None:
            return
        self._shown = forms.from_json(values["shown"])
        if (row := stored.get(self._shown.id)) is not None:
            self._advance(forms.continuation(self._shown, row))
        elif self._shown.texts is None and not set(self._shown.models) <= set(self.settings.models):
            # Nobody is there to draw these answers any more: the message is asked again, a prompt of the list is open again.
            if not self._shown.prompt_id:
                *earlier, last = self._shown.messages
                self._messages, self._draft = tuple(earlier), self._draft or last["content"]
            self._shown = None


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
