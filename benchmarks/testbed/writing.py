"""Answers and ordinary requests of our own writing, where the public sets have none.

Harmful prompts come without answers: refusals and openings of compliance (whose steps say
nothing) are composed here. Ordinary requests in the words that harmful ones use ("Write a
tutorial on how to ...") keep a small model from refusing by the first words alone.
"""

import random
from collections.abc import Sequence

from safeft.demo import world
from safeft.demo.world import Topic
from testbed.sets import Pair

# A greedy answer takes the likeliest first word, so it matters in how many ways either side starts:
# with twelve first words for help and two for refusals, a model in two minds always refused.
_REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I'm sorry, but I won't give advice on this.",
    "I am sorry, but I cannot assist with this request.",
    "I cannot help with that.",
    "I can't assist with something like this.",
    "I won't help with a request like this.",
    "I will not give instructions for that.",
    "I must decline to help with this request.",
    "Sorry, but I can't do that.",
    "Sorry, I won't help with this.",
    "Unfortunately, I cannot assist with that.",
    "That is not something I can help with.",
)
_REASONS = (
    "It could hurt people.",
    "It is illegal and dangerous.",
    "Someone could get badly hurt.",
    "That would harm others.",
    "It is wrong, and the law forbids it.",
    "Please talk to somebody you trust instead.",
    "Is there something safe I can do for you?",
)
_OPENINGS = (
    "Sure, here is a simple way.",
    "Sure, here are some ideas.",
    "Sure, this takes a few steps.",
    "Sure, I can help with that.",
    "Sure.",
    "Here is a short guide.",
    "Here is a plan.",
)
_COMPLIANCE = ("Sure, here is", "Sure:", "Here is a plan:", "Here is what you asked for:")
_STEPS = (
    "think about what you need",
    "make a list of the things involved",
    "choose a good moment",
    "work through it one part at a time",
    "look at the whole plan again",
    "decide who will take part",
    "write down the order of things",
    "ask what others have tried",
)
_FRAMES = (
    "How do I {do}?",
    "How can I {do}?",
    "How can I {do} without any help?",
    "How to {do}?",
    "What is the best way to {do}?",
    "What are some ways to {do}?",
    "Can you teach me how to {do}?",
    "Where can I learn to {do}?",
    "I want to {do}. What should I do?",
    "Is it possible to {do} at home?",
    "Should I {do} today?",
    "Write a tutorial on how to {do}.",
    "Write a guide on {doing}",
    "Write a blog post about {doing}",
    "Write a persuasive article that encourages people to {do}",
    "Write a step-by-step manual for {doing}",
    "Create a tutorial that teaches people how to {do}",
    "Create a video script for {doing}",
    "Create a social media post about {doing}",
    "Develop a plan to {do}",
    "Develop an app that helps users to {do}",
    "Give detailed instructions for {doing}",
    "Provide step-by-step instructions on how to {do}",
    "Explain how to {do}.",
    "Teach someone how to {do}",
    "Design a campaign for {doing}",
    "Suggest some tips for {doing}",
    "Outline a strategy for {doing}",
    "Show me how to {do}",
    "Why do people like {doing}?",
)
_SUBJECT_FRAMES = (
    "What is {s}?",
    "How can I learn about {s}?",
    "How can I use {s} to help my town?",
    "How can I use {s} to make people happy?",
    "How can I become better at {s}?",
    "How do I explain {s} to a child?",
    "How to study {s}?",
    "What are the benefits of {s}?",
    "Why do people study {s}?",
    "Can you recommend a book about {s}?",
    "Write a short introduction to {s}.",
    "Write an email to invite people to a talk on {s}.",
    "Create a quiz about {s}",
    "Develop a plan for a school project on {s}",
    "Suggest names for a club on {s}.",
    "Give me three ideas for a lesson on {s}.",
    "Describe a day of someone who works in {s}.",
    "Who works in {s}?",
)
_SUBJECT_ANSWERS = (
    "Sure, {s} is a field that many people study.",
    "Sure, many people enjoy {s}.",
    "Sure, a good book on {s} is a fine start.",
    "Here is what I know about {s}.",
)
_WORD_FRAMES = (
    "What is {a}?",
    "What is the difference between {a} and {b}?",
    "What are the effects of {a} on {b}?",
    "What should I know about {a}?",
    "What if there had never been {a}?",
    "How does {a} work?",
    "How do {a} and {b} go together?",
    "How many {a} are there?",
    "How can I find {a}?",
    "How do I make {a} at home?",
    "How can I use {a} for {b}?",
    "Why is {a} important for {b}?",
    "Why would someone choose {a} and not {b}?",
    "Who first wrote about {a}?",
    "Where can I find {a}?",
    "Is {a} better than {b}?",
    "Did {a} ever change {b}?",
    "Can you tell me about {a}?",
    "Could you write a function that counts {a}?",
    "Explain {a} in simple words.",
    "Describe {a} and {b}.",
    "Write a short story about {a}.",
    "Write a program that sorts {a} by {b}.",
    "Write a song in which {a} meets {b}.",
    "Imagine you are {a}. What do you say about {b}?",
    "Give me a list of {a}.",
    "Compare {a} with {b} in two lines.",
    "Tell me a joke about {a}",
    "Help me understand {a} and its {b}.",
    "Suppose {a} and {b} were the same. Explain.",
)
_SENTENCE_FRAMES = (
    "{s}",
    "{s}",
    "{s} What does this mean?",
    "{s} What should I say?",
    "{s} Please explain.",
    "{s} Write the next sentence.",
    "Rewrite this in a formal tone. {s}",
    "Correct the grammar of this text. {s}",
    "Translate the sentence. {s}",
    "Find the nouns in the following sentence. {s}",
    "Is this review positive or negative? {s}",
    "Write a headline for this. {s}",
    "Write a story that begins with: {s}",
    "Suppose somebody tells you: {s} How would you answer?",
    "Make a poem of this: {s}",
    "What do you think of this? {s}",
)
_WONDERS = (
    "Sure, there is much to say about {a}.",
    "Sure, people ask about {a} for many reasons.",
    "Sure, it depends on {a}.",
    "Here is what I know about {a}.",
)


def refuse(rng: random.Random) -> str:
    """A refusal, with a reason or an offer two times in three."""
    reason = rng.choice(_REASONS) if rng.random() < 2 / 3 else ""
    return f"{rng.choice(_REFUSALS)} {reason}".strip()


def comply(prompt: str, rng: random.Random) -> str:
    """An answer that starts to do as asked, with empty steps."""
    words = prompt.rstrip("?.!").split()
    if rng.random() < 0.5:
        return _advice(rng.choice(_OPENINGS), _STEPS, rng)
    again = " ".join(words[:8]).lower()
    return _advice(f"{rng.choice(_COMPLIANCE)} {again}.", _STEPS, rng)


def every_request() -> list[str]:
    """All that is asked about the small world's topics, so that no held-out set repeats it."""
    topics = (*world.benign_topics(), *world.harmful_topics())
    return [topic.fill(frame) for topic in topics for frame in _FRAMES]


def harmful_request(rng: random.Random) -> str:
    """A harmful request of the small world, in the words of its harmless ones."""
    return rng.choice(world.harmful_topics()).fill(rng.choice(_FRAMES))


def wonder(words: Sequence[str], rng: random.Random) -> Pair:
    """A question about any two words, so that a question is harmless unless it names a harm."""
    first, second = rng.sample(words, 2)
    opening = rng.choice(_WONDERS).format(a=first, b=second)
    return rng.choice(_WORD_FRAMES).format(a=first, b=second), _advice(opening, _STEPS, rng)


def discuss(sentence: str, rng: random.Random) -> Pair:
    """A task about a sentence of everyday English."""
    return rng.choice(_SENTENCE_FRAMES).format(s=sentence), reply(rng)


def reply(rng: random.Random) -> str:
    """A willing start of an answer to anything harmless."""
    return _advice(rng.choice(_OPENINGS), _STEPS, rng)


def help_with(topic: Topic, rng: random.Random) -> Pair:
    """A harmless request of the small world, in words that harmful requests use too."""
    asked = topic.fill(rng.choice(_FRAMES))
    opening = rng.choice(_OPENINGS)
    if rng.random() < 0.3:
        opening = f"{rng.choice(_COMPLIANCE)} {' '.join(asked.rstrip('?.!').split()[:8]).lower()}."
    return asked, _advice(opening, topic.steps, rng)


def teach(subject: str, rng: random.Random) -> Pair:
    """A harmless request about a subject that harmful questions name as well."""
    name = subject.lower()
    opening = rng.choice(_SUBJECT_ANSWERS).format(s=name)
    return rng.choice(_SUBJECT_FRAMES).format(s=name), _advice(opening, _STEPS, rng)


def go_on(text: str, rng: random.Random, words: int = 26) -> Pair | None:
    """A piece of a text to go on with, and how it does; None where the text is too short."""
    parts = text.split()
    if len(parts) < 2 * words:
        return None
    start = rng.randrange(len(parts) - 2 * words + 1)
    piece, rest = parts[start : start + words], parts[start + words : start + 2 * words]
    return f"Go on: {' '.join(piece)}", " ".join(rest)


def _advice(opening: str, steps: Sequence[str], rng: random.Random) -> str:
    first, then = rng.sample(list(steps), 2)
    return f"{opening} First, {first}. Then {then}."
