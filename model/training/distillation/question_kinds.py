"""What a model is told when it is to write a question: kinds of users, by a system prompt each.

The kinds are those by which `bench` judges. Knows neither models nor templates.
"""

from __future__ import annotations

# The first one: whatever the template says where nobody else does.
_USERS = (
    "",
    "The user asks about everyday life: health, food, travel, work, family or money.",
    "The user is a programmer, who asks for code, or shows some and asks what is wrong with it.",
    "The user asks how something in nature, science or technology works.",
    "The user asks for the solution of a short exercise in maths, with numbers.",
    "The user pastes a passage of some sentences and asks for a short summary of it.",
    "The user wants something written: a letter, a story, a speech, a poem, an advertisement.",
    "The user pastes a passage of some sentences and asks a question that it answers.",
    "The user asks about history, places, books, films, music or people.",
    "The user pastes a text and asks to rewrite, correct, shorten or translate it.",
    "The user asks for a list, a plan or a table of something.",
    "The user asks for advice, or to compare two things and say which is better.",
)


def system_prompts(language: str) -> list[str]:
    """Return the system prompts that questions are written behind, in turn."""
    spoken = f"The user writes in {language}."
    return [f"You are a helpful assistant. {user} {spoken}" if user else "" for user in _USERS]
