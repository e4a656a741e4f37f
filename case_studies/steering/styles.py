"""Prompts in two styles, plays and encyclopaedia articles, and prompts of neither."""

from __future__ import annotations

import itertools
import random

SPEAKERS = ("ROMEO", "KING HENRY", "GLOUCESTER", "First Citizen", "LADY ANNE", "PROSPERO", "MENENIUS", "Nurse", "BRUTUS", "ISABELLA")
SPEECHES = (
    "I pray thee, good sir,", "What say you to my", "O, that I were a", "Come hither, my lord, and", "Thou art too", "Go, get thee to the",
    "Alas, the day! I have", "My gracious liege, the", "Hath he not said that", "Why, then, I will",
)  # fmt: skip
TOPICS = (
    "The city",
    "The album",
    "The river",
    "The battalion",
    "The film",
    "The species",
    "The railway",
    "The storm",
    "The church",
    "The series",
)
SENTENCES = (
    "was built in 1890 , and", "is located in the north of the", "received positive reviews from", "was first recorded in the early",
    "has been described as a", "is the second largest of the", "was released in the United", "covers an area of about",
    "moved to the west and", "began in September 1942 ,",
)  # fmt: skip
NEUTRAL_STARTS = (
    "The king", "In the night", "The old man", "A great house", "The people of the", "His father", "When they came", "The first day",
    "She had", "At the end of", "The war", "All the world", "A small boy", "The queen and", "Before the", "They were", "The sea",
    "On the road", "My brother", "There is a",
)  # fmt: skip
NEUTRAL_ENDS = ("was", "and the", "said that", "of")


def plays() -> list[str]:
    """One hundred beginnings of speeches."""
    return [f"{speaker}:\n{speech}" for speaker, speech in itertools.product(SPEAKERS, SPEECHES)]


def articles() -> list[str]:
    """One hundred beginnings of sentences from articles."""
    return [f" {topic} {sentence}" for topic, sentence in itertools.product(TOPICS, SENTENCES)]


def neutral() -> list[str]:
    """Eighty beginnings that could be of either."""
    return [f"{start} {end}" for start, end in itertools.product(NEUTRAL_STARTS, NEUTRAL_ENDS)]


def divided(texts: list[str], seed: int = 0) -> tuple[list[str], list[str]]:
    """Both halves of a shuffle: to find with, and to hold out."""
    shuffled = list(texts)
    random.Random(seed).shuffle(shuffled)
    return shuffled[: len(texts) // 2], shuffled[len(texts) // 2 :]
