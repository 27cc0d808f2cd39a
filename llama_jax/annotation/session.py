"""The desk without its page: raters, dialogs, blinding, and what is kept, so that neither a reload nor a kill loses anything.

Rows go to the output as they are given. Beside it, in `<output>.desk/`, lies one file a rater with the dialog that is open,
written whole at each step, and `answers.jsonl` with the answers that all raters of a prompt list share.
"""

import dataclasses
import datetime
import functools
import json
import os
import random
import re
import secrets
import threading
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

_NAME = re.compile(r"\w[\w .@-]{0,39}")


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
        """What is listed and fits the context of each model that is to answer; looked at once, when the models are there."""
        return [task for task in self.listed if all(self.answerer.fits(model, task.messages) for model in set(task.models))]

    @property
    def too_long(self) -> int:
        """How many of the list nobody is shown."""
        return len(self.listed) - len(self.tasks)

    def session(self, rater: str) -> "Session":
        """The session of a rater, as it was left; ValueError for a name that is none."""
        rater = rater.strip()
        if not _NAME.fullmatch(rater):
            raise ValueError("A name has 1 to 40 letters, digits, spaces, dots or dashes.")
        if self.settings.raters and rater not in self.settings.raters:
            raise ValueError(f"{rater} is not among the raters of this desk.")
        with self._lock:
            if rater not in self._sessions:
                self._sessions[rater] = Session(self, rater)
            return self._sessions[rater]

    def known_answers(self, prompt_id: str, models: Sequence[str]) -> tuple[str, ...] | None:
        """What these models answered to a prompt of the list before, for another rater."""
        found = {row["model"]: row["answer"] for row in self.shared.rows if row["prompt_id"] == prompt_id}
        return tuple(found[name] for name in models) if found.keys() >= set(models) else None

    def remember(self, shown: Shown) -> None:
        """Keeps the answers of a prompt of the list for the other raters, unless they are known."""
        with self._lock:
            for model, text in zip(shown.models, shown.texts):
                if self.known_answers(shown.prompt_id, [model]) is None:
                    self.shared.append({"prompt_id": shown.prompt_id, "model": model, "answer": text})

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
        self._path = desk.directory / f"{quote(rater, safe='')}.json"
        self._lock = threading.RLock()
        self._pair: Pair | None = None
        self._error = ""
        self._messages: tuple[Message, ...] = ()
        self._shown: Shown | None = None
        self._choice = ""
        rows = [row for row in desk.output.rows if row.get("rater") == rater]
        self._rated = len(rows)
        self._judged = {judged(row, desk.settings) for row in rows}
        self._restore({row.get("shown_id"): row for row in rows})

    # ---- what the page calls ----

    def view(self) -> View:
        """What to show now."""
        with self._lock:
            left = None if not self.desk.listed else len(self._open_tasks())
            shared = {"rated": self._rated, "left": left, "too_long": self.desk.too_long, "error": self._error}
            if self._shown is None:
                phase = "done" if left == 0 and not self._messages else "write"
                return View(phase, self._messages, is_safety=self._track, **shared)
            shown = self._shown
            texts = shown.texts if shown.texts is not None else self._pair.texts if self._pair else ()
            if self._pair and self._pair.error:
                shared["error"] = self._pair.error
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
        """The rater's next message; ValueError if it cannot be asked."""
        with self._lock:
            if self._shown is not None:
                raise ValueError("Judge the answers first.")
            if not text.strip():
                raise ValueError("Write a message first.")
            messages = (*self._messages, {"role": "user", "content": text.strip()})
            check_messages(messages, "The message")
            self._track = self._track if is_safety is None else is_safety
            self._show(own_prompt(messages, self.settings, is_safety=self._track, chance=self.desk.chance()))

    def stream(self, seconds: float = 0.2) -> Iterator[View]:
        """Views while the answers grow, ending with the one in which they are complete."""
        while True:
            view = self.view()
            pair = self._pair
            yield view
            if view.phase != "answer" or pair is None or pair.error:
                return
            pair.wait(seconds)

    def rate(self, shown_id: str, choice: str | None, safety_bin: str | None = None) -> dict[str, Any]:
        """Stores a judgement and goes on; returns its row. ValueError, with words for the rater, if it cannot be stored."""
        with self._lock:
            shown = self._require(shown_id)
            record = Record(self.rater, _now(), self.settings.source, self.settings.batch)
            row = forms.row(shown, self.settings.mode, choice, safety_bin, record) | {"shown_id": shown.id}
            self.desk.output.append(row)
            self._rated += 1
            self._judged.add(identity(shown, self.settings))
            self._advance(forms.preferred(shown, choice) if self.settings.mode == "preference" else None)
            return row

    def skip(self, shown_id: str) -> None:
        """Leaves a pair without a judgement; a prompt of the list counts as seen."""
        with self._lock:
            shown = self._require(shown_id)
            if self._pair:
                self._pair.stop()
            if shown.prompt_id:
                self._judged.add(identity(shown, self.settings))
                self._skipped.append(list(identity(shown, self.settings)))
            self._shown, self._pair = None, None
            self._messages = shown.messages[:-1] if not shown.prompt_id else ()
            self._save()
            self.begin()

    def new_dialog(self) -> None:
        """Ends the dialog; ValueError while answers wait to be judged."""
        with self._lock:
            if self._shown is not None:
                raise ValueError("Judge the answers first, or skip them.")
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
            raise ValueError("This was judged already, in another window.")
        return self._shown

    def _open_tasks(self) -> list[Task]:
        """Prompts of the list that this rater has not judged, in an order of the rater's own."""
        tasks = list(self.desk.tasks)
        random.Random(self.rater).shuffle(tasks)
        return [task for task in tasks if identity(task, self.settings) not in self._judged]

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
        except ValueError:  # the dialog is too long, or the model busy: nothing has happened
            self._shown, self._messages = before
            raise
        finally:
            self._save()

    def _draw(self) -> None:
        shown, self._pair = self._shown, None
        if self._shares(shown) and (texts := self.desk.known_answers(shown.prompt_id, shown.models)):
            self._shown = dataclasses.replace(shown, texts=texts)
            return
        draws = [
            Draw(model, shown.messages, temperature, self._seed, index)
            for index, (model, temperature) in enumerate(zip(shown.models, shown.temperatures))
        ]
        distinct = self.settings.mode == "preference"
        self._pair = Pair(self.desk.answerer, draws, distinct=distinct, done=lambda texts: self._drawn(shown.id, texts)).start()

    def _drawn(self, shown_id: str, texts: tuple[str, ...]) -> None:
        with self._lock:
            if self._shown is None or self._shown.id != shown_id:
                return
            complete = dataclasses.replace(self._shown, texts=texts)
            if self._shares(complete):
                self.desk.remember(complete)
                complete = dataclasses.replace(complete, texts=self.desk.known_answers(complete.prompt_id, complete.models))
            self._shown = complete
            self._save()

    def _shares(self, shown: Shown) -> bool:
        """Whether all raters judge the same answers: those to a prompt of the list, when people evaluate models."""
        return bool(shown.prompt_id) and self.settings.mode != "preference"

    def _advance(self, chosen: str | None) -> None:
        """The chosen answer continues the dialog; without one, the next prompt begins."""
        shown = self._shown
        self._messages = () if chosen is None else (*shown.messages, {"role": "assistant", "content": chosen})
        self._shown, self._pair = None, None
        self._save()
        if chosen is None:
            self.begin()

    def _save(self) -> None:
        write_json(self._path, {
            "rater": self.rater, "messages": list(self._messages), "seed": self._seed, "skipped": self._skipped,
            "track": self._track,
            "shown": None if self._shown is None else forms.to_json(self._shown),
        })  # fmt: skip

    def _restore(self, stored: Mapping[str, Mapping[str, Any]]) -> None:
        """Reads the open dialog; a judgement that was stored just before a kill is not asked for again."""
        self._seed, self._skipped, self._track = 0, [], self.settings.safety_track
        if not self._path.exists():
            return
        values = json.loads(self._path.read_text(encoding="utf-8"))
        self._messages, self._seed, self._skipped = tuple(values["messages"]), values["seed"], values["skipped"]
        self._track = values["track"]
        self._judged |= {tuple(done) for done in self._skipped}
        if values["shown"] is None:
            return
        self._shown = forms.from_json(values["shown"])
        if (row := stored.get(self._shown.id)) is not None:
            self._advance(row.get("chosen"))


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
