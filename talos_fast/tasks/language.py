"""The seven language tasks and RTE: our own prompts over the rows in which they are published."""

import csv
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from talos_fast.errors import TalosError
from talos_fast.tasks.base import Split

Row = Mapping[str, Any]

VALIDATION = 32
"""Examples that α is chosen on, where the source has no labelled test split (as in the paper)."""

SHUFFLE_SEED = 42


@dataclass(frozen=True)
class Example:
    """A prompt, the right answer's position, and the answers if they are the example's own."""

    text: str
    label: int
    choices: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Source:
    """How rows become a task.

    Args:
        example: a row to its prompt.
        columns: that a row must have.
        answers: class names; the answers, unless the examples have their own.
        splits: our split -> the source's; a test split taken from "validation" is cut into validation and test.
    """

    example: Callable[[Row], Example]
    columns: tuple[str, ...]
    answers: tuple[str, ...]
    splits: tuple[tuple[str, str], ...] = (("train", "train"), ("validation", "validation"), ("test", "test"))

    def read(self, rows: Mapping[str, list[Row]], where: str) -> dict[str, Split]:
        """Splits from the rows of each of the source's splits.

        Raises:
            TalosError: a split or a column is missing, or there are too few rows.
        """
        found = {}
        for ours, theirs in self.splits:
            if theirs not in rows:
                raise TalosError(f"{where}: found the splits {sorted(rows)}, but no {theirs}; fetch the whole data set")
            found[ours] = self._split(rows[theirs], f"{where}, split {theirs}")
        if "validation" not in found:
            whole = found.pop("test")
            if len(whole) <= VALIDATION:
                raise TalosError(f"{where}: {len(whole)} rows to test on; more than {VALIDATION} are needed")
            order = np.random.default_rng(SHUFFLE_SEED).permutation(len(whole))
            found |= {"validation": whole.select(order[:VALIDATION]), "test": whole.select(order[VALIDATION:])}
        return found

    def _split(self, rows: list[Row], where: str) -> Split:
        if rows and (missing := [name for name in self.columns if name not in rows[0]]):
            raise TalosError(f"{where}: found the columns {sorted(rows[0])}, but no {missing[0]}; another data set?")
        examples = [self.example(row) for row in rows]
        choices = [example.choices for example in examples if example.choices is not None]
        labels = np.asarray([example.label for example in examples], dtype=np.int64)
        return Split([example.text for example in examples], labels, choices or None)


def _options(texts: tuple[str, ...]) -> str:
    return ", ".join(texts[:-1]) + " or " + texts[-1]


def qasc(row: Row) -> Example:
    """Eight answers to a question of science, after the two facts that it follows from."""
    choices = tuple(row["choices"]["text"])
    text = f"Facts: {row['fact1']} {row['fact2']} Question: {row['question']} Answer with one of: {_options(choices)}."
    return Example(text, list(row["choices"]["label"]).index(row["answerKey"]), choices)


def wiki_qa(row: Row) -> Example:
    """Does a sentence answer a question?"""
    text = f"Question: {row['question']} Sentence: {row['answer']} Does the sentence answer the question?"
    return Example(text, int(row["label"]))


def quartz(row: Row) -> Example:
    """Two answers to a question of qualitative relations, after the paragraph that states one."""
    choices = tuple(row["choices"]["text"])
    text = f"Background: {row['para']} Question: {row['question']} Answer with {_options(choices)}."
    return Example(text, list(row["choices"]["label"]).index(row["answerKey"]), choices)


def paws(row: Row) -> Example:
    """Do two sentences of nearly the same words mean the same?"""
    text = f"Sentence 1: {row['sentence1']} Sentence 2: {row['sentence2']} Do both sentences say the same?"
    return Example(text, int(row["label"]))


def story_cloze(row: Row) -> Example:
    """Which of two sentences ends a story of four; columns of the published CSV files."""
    story = " ".join(row[f"InputSentence{number}"] for number in range(1, 5))
    choices = (row["RandomFifthSentenceQuiz1"], row["RandomFifthSentenceQuiz2"])
    text = f"Story: {story} How does the story go on? {choices[0]} Or: {choices[1]}"
    return Example(text, int(row["AnswerRightEnding"]) - 1, choices)


def winogrande(row: Row) -> Example:
    """Which of two names fills the gap."""
    choices = (row["option1"], row["option2"])
    text = f"{row['sentence']} What does the underscore stand for, {choices[0]} or {choices[1]}?"
    return Example(text, int(row["answer"]) - 1, choices)


def wsc(row: Row) -> Example:
    """Does a pronoun stand for a noun phrase?"""
    text = f'{row["text"]} In this passage, does "{row["span2_text"]}" stand for "{row["span1_text"]}"?'
    return Example(text, int(row["label"]))


def rte(row: Row) -> Example:
    """Does a hypothesis follow from a premise? Label 0 is entailment, the answer yes."""
    return Example(f"{row['premise']} Does it follow that {row['hypothesis']}", int(row["label"]))


NO_YES = ("no", "yes")
CUT = (("train", "train"), ("test", "validation"))
LETTERS = tuple("ABCDEFGH")

SOURCES = {
    "qasc": Source(qasc, ("question", "choices", "answerKey", "fact1", "fact2"), LETTERS, CUT),
    "wiki_qa": Source(wiki_qa, ("question", "answer", "label"), NO_YES),
    "quartz": Source(quartz, ("question", "choices", "answerKey", "para"), LETTERS[:2]),
    "paws": Source(paws, ("sentence1", "sentence2", "label"), NO_YES),
    "story_cloze": Source(
        story_cloze, ("InputSentence1", "RandomFifthSentenceQuiz1", "AnswerRightEnding"), LETTERS[:2],
        (("train", "validation"), ("test", "test")),
    ),
    "winogrande": Source(
        winogrande, ("sentence", "option1", "option2", "answer"), LETTERS[:2], CUT
    ),
    "wsc": Source(wsc, ("text", "span1_text", "span2_text", "label"), NO_YES, CUT),
    "rte": Source(rte, ("premise", "hypothesis", "label"), ("yes", "no"), CUT),
}  # fmt: skip


def story_cloze_rows(folder: Path) -> dict[str, list[Row]]:
    """The rows of the two CSV files that one gets on request: their names hold "val" and "test".

    Raises:
        TalosError: one of them is missing.
    """
    rows: dict[str, list[Row]] = {}
    for split, mark in (("validation", "val"), ("test", "test")):
        # Both names begin with "cloze_test_", so that part says nothing.
        files = [path for path in sorted(folder.glob("*.csv")) if mark in path.name.lower().removeprefix("cloze_test_")]
        if not files:
            raise TalosError(
                f"{folder}: no CSV file of the {split} stories; ask the authors for both, and put them here"
            )
        with files[0].open(newline="", encoding="utf-8") as file:
            rows[split] = list(csv.DictReader(file))
    return rows
