"""A hundred arithmetic word problems of the tests' own, in the style of GSM8K: real sentences, worked answers,
calculator marks, a final number after ####, and a few rows as long as the longest of that set."""

from __future__ import annotations

import json
import random

PEOPLE = ("Mirela", "Tomas", "Aïcha", "Jun", "Óscar", "Priya", "Noor", "Wanda")
GOODS = ("jars of honey", "wool socks", "tram tickets", "clay tiles", "notebooks", "pears", "light bulbs")
PLACES = ("the Saturday market", "her uncle’s shop", "the school fair", "the harbour", "the village library")


def problems(count: int = 100, *, seed: int = 0) -> list[tuple[str, str]]:
    """Question and worked answer; every tenth has many steps and runs to about 1,600 characters."""
    dice = random.Random(seed)
    return [_problem(dice, steps=18 if index % 10 == 9 else dice.randint(2, 4)) for index in range(count)]


def as_jsonl(rows: list[tuple[str, str]]) -> bytes:
    turns = ([{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in rows)
    return "".join(json.dumps({"messages": pair}, ensure_ascii=False) + "\n" for pair in turns).encode()


def _problem(dice: random.Random, *, steps: int) -> tuple[str, str]:
    who, goods, place = dice.choice(PEOPLE), dice.choice(GOODS), dice.choice(PLACES)
    have = dice.randint(3, 40)
    question, answer = [f"{who} has {have} {goods} to sell at {place}."], []
    for number in range(1, steps + 1):
        change = dice.randint(2, 30)
        if dice.random() < 0.5 and change < have:
            question.append(f"On day {number}, {who} sells {change} of them.")
            answer.append(
                f"After day {number} there are {have} - {change} = <<{have}-{change}={have - change}>>{have - change} left."
            )
            have -= change
        else:
            question.append(f"On day {number}, a friend brings {change} more.")
            answer.append(
                f"Day {number} makes it {have} + {change} = <<{have}+{change}={have + change}>>{have + change} {goods}."
            )
            have += change
    question.append(f"How many {goods} are there in the end?")
    return " ".join(question), "\n".join([*answer, f"#### {have}"])
