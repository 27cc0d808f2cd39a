"""What models are told and asked in the evaluation of tools and of time (section 5.1): the paper prints no prompt of Table 15.

All texts are ours. Zero-shot: a system message says how a tool is called, no question is shown with its answer. With the tool
and without it the question and the form of the answer are the same.
"""

from typing import Any

from llama_jax.data.dialog import Message

_CALCULATOR = (
    "To compute something, write an arithmetic expression between <calculator> and </calculator>; it may have numbers, "
    "+ - * / // % **, parentheses, sqrt() and round(). "
)
_SEARCH = "To look something up, write what you want to know between <search> and </search>. "
_RESULT = (
    "The result is then put behind your call, between <result> and </result>, and you go on from there; never write a result "
    "yourself. A call looks like this: <calculator>(17 + 5) * 3</calculator> <result>66</result>. "
)
_ANSWER = "Solve the problem step by step. End with the sentence: The answer is N. Write a number for N, without a unit."

WITH_CALCULATOR = f"You have a calculator. {_CALCULATOR}{_RESULT}{_ANSWER}"
WITHOUT_TOOLS = _ANSWER
WITH_SEARCH = (
    f"You have two tools, a search engine and a calculator. {_SEARCH}{_CALCULATOR}{_RESULT}Look up every fact that you need, "
    "one at a time, and compute with what you have found. End with the sentence: The answer is N."
)

# Fig. 22: what the system message says of the time.
TIMES = ("The year is {year}.", "Knowledge cut-off: {year}.")
# Questions, the year of their event (before it they make no sense; None: there is none), and the years they are asked in.
TIME_QUESTIONS: tuple[tuple[str, int | None, tuple[int, int]], ...] = (
    ("Who won the Second World War?", 1945, (1940, 2023)),
    ("How long ago did people first walk on the Moon?", 1969, (1960, 2019)),
    ("How long ago did the Berlin Wall fall?", 1989, (1980, 2009)),
    ("Is the Earth flat or round?", None, (852, 2023)),
)
# Fig. 23: two searches, then a computation.
CHAIN_QUESTIONS = (
    "How many years lie between the first flight of the Wright brothers and the first Moon landing?",
    "How many times as high as the Eiffel Tower is Mount Everest?",
    "How many years older than the telephone is the telegraph?",
)


def problem(question: str, *, calculator: bool) -> list[Message]:
    """A word problem as it is asked with the calculator or without it."""
    return [
        {"role": "system", "content": WITH_CALCULATOR if calculator else WITHOUT_TOOLS},
        {"role": "user", "content": question},
    ]


def times() -> list[dict[str, Any]]:
    """What is asked for Fig. 22: {"question", "event": its year or None, "said": the system message, "year"} each."""
    return [
        {"question": question, "event": event, "said": said.format(year=year), "year": year}
        for question, event, years in TIME_QUESTIONS for said in TIMES for year in years
    ]  # fmt: skip


def at_time(question: str, said: str) -> list[Message]:
    """A question under a system message that says the time."""
    return [{"role": "system", "content": said}, {"role": "user", "content": question}]


def chain(question: str) -> list[Message]:
    """A question that takes search and calculator."""
    return [{"role": "system", "content": WITH_SEARCH}, {"role": "user", "content": question}]
