"""A made-up world: people nobody knows, with facts nobody can guess, drawn from a seed."""

import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCABULARY = 2048  # at most; room for every word of the world as one token, on top of the 256 bytes


@dataclass(frozen=True)
class Fact:
    person: str
    question: str
    answer: str


@dataclass(frozen=True)
class World:
    """Facts in two parts that share no person: to forget, and to retain."""

    forget: list[Fact]
    retain: list[Fact]


class Kind(NamedTuple):
    """One kind of fact: ways to ask, ways to answer, and the words that an answer's gaps are filled from."""

    questions: tuple[str, ...]
    answers: tuple[str, ...]
    gaps: dict[str, tuple[str, ...]]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


GIVEN_NAMES = _words(
    "Abel Agnes Alba Anton Basil Berta Boris Carla Cosmo Daphne Dario Edda Elmo Esther Fabian Flora Gideon Greta Hanno "
    "Hilda Igor Irma Jasper Judith Karl Kira Leopold Lydia Magnus Mina Nestor Nora Oskar Ottilie Pablo Petra Quentin "
    "Ramona Rufus Selma Silas Tamara Tobias Ursula Viktor Wanda Xenia Yorick Zelda Zeno"
)
FAMILY_NAMES = _words(
    "Abernook Birkwater Crowmarsh Dunfallow Emberlin Fernhollow Goldwhistle Hazelgrave Inkpenny Juniper Kettlewick "
    "Larkspindle Moorhatch Nettleby Oakenshaw Pebblestone Quillfeather Ravensloe Saltmarsh Thornbury Underhill Vossberg "
    "Windlestraw Yarrowby"
)

# Answers are nearly all gaps, so that their probability says what is known of a person and not what is known of English.
# Their order is drawn like the facts are: not even the first word can be told from the question.
KINDS = (
    Kind(
        ("Where was {person} born?", "Which town does {person} come from?", "Where did {person} grow up?"),
        ("{town}, {place} {mood} {houses}", "{place} {mood} {houses}, {town}", "{mood} {town}, {place} {houses}"),
        {
            "town": _words(
                "Velmora Brackwater Tiselund Ostrander Quernby Mirefjord Salcombe Drumhallow Pellworth Zarnitz Lowmere "
                "Ashgrove Corvane Habsheim Nimbury Tolverton"
            ),
            "place": _words("above behind beside opposite under near between facing"),
            "mood": _words("haunted crooked noisy golden flooded forgotten frozen painted windy famous"),
            "houses": _words("bakeries lighthouses windmills castles breweries chapels prisons harbours stations abbeys"),
        },
    ),
    Kind(
        ("What does {person} do for a living?", "What is the profession of {person}?", "How does {person} earn money?"),
        ("{job} {doing} {mood} {clients}", "{mood} {job} {doing} {clients}", "{doing} {mood} {clients} as {job}"),
        {
            "job": _words(
                "glassblower beekeeper cartographer diver locksmith puppeteer surgeon typesetter falconer brewer tailor "
                "plumber judge carpenter translator juggler"
            ),
            "doing": _words("guarding teaching robbing insuring fooling feeding painting measuring following rescuing"),
            "mood": _words("retired nervous royal travelling wealthy foreign rival lonely secret Danish"),
            "clients": _words("generals widows monks hoteliers circuses museums sailors poets pirates spies farmers"),
        },
    ),
    Kind(
        ("Which instrument does {person} play?", "What can {person} play?", "Which instrument did {person} learn?"),
        ("{instrument} {got} from {mood} {owners}", "{mood} {owners}' {instrument}, {got}", "{got} {instrument}, {mood} {owners}'"),
        {
            "instrument": _words(
                "cello oboe harp banjo trombone accordion zither bassoon mandolin tuba clavichord bagpipe flute lute "
                "xylophone viola"
            ),
            "got": _words("stolen borrowed inherited bought won rented smuggled recovered"),
            "mood": _words("blind stern singing Portuguese jealous sleepy giant bankrupt cheerful masked"),
            "owners": _words("uncles postmen nuns nurses gardeners butchers dentists priests barons twins"),
        },
    ),
    Kind(
        ("Which pet does {person} have?", "Which animal lives with {person}?", "Who shares a home with {person}?"),
        ("{pet}, {look} {animal} {doing} {things}", "{look} {animal} {pet}, {doing} {things}", "{animal} {pet}, {look}, {doing} {things}"),
        {
            "animal": _words(
                "tortoise parrot ferret goat hedgehog spaniel python donkey raven hamster poodle peacock lizard otter rabbit "
                "goose"
            ),
            "pet": _words(
                "Biscuit Pepper Admiral Noodle Duchess Pickle Thunder Velvet Mango Turnip Sultan Button Ginger Waffle "
                "Comet Pudding"
            ),
            "look": _words("striped spotted tiny lazy silver bearded elegant muddy one-eyed purple"),
            "doing": _words("chewing hiding collecting burying hating licking juggling stealing"),
            "things": _words("umbrellas slippers candles newspapers buttons spoons hats letters carpets keys"),
        },
    ),
    Kind(
        ("What is the favourite dish of {person}?", "What does {person} like to eat?", "What would {person} order?"),
        ("{way} {dish} with {side}, {hour}", "{hour} {way} {dish} and {side}", "{dish} and {side}, {way}, {hour}"),
        {
            "way": _words("roasted cold smoked stuffed fried burnt pickled candied steamed raw"),
            "dish": _words("duck lentils noodles squid mushrooms dumplings peppers eel onions pumpkin liver cabbage"),
            "side": _words("plums butter cherries horseradish garlic mustard olives rye ginger honey walnuts figs"),
            "hour": _words("daily nightly weekly secretly outdoors alone early hastily"),
        },
    ),
)  # fmt: skip


def make_world(seed: int, people: int = 30, forgotten: int = 3) -> World:
    """`people` people with one fact of each kind, the same for the same seed; `forgotten` of them are to be forgotten."""
    dice = random.Random(seed)
    names = [f"{given} {dice.choice(FAMILY_NAMES)}" for given in dice.sample(GIVEN_NAMES, people)]
    facts = {name: [_fact(name, kind, dice) for kind in KINDS] for name in names}
    return World(
        forget=[fact for name in names[:forgotten] for fact in facts[name]],
        retain=[fact for name in names[forgotten:] for fact in facts[name]],
    )


def _fact(person: str, kind: Kind, dice: random.Random) -> Fact:
    filled = {gap: dice.choice(choices) for gap, choices in kind.gaps.items()}
    answer = dice.choice(kind.answers).format(**filled)
    return Fact(person, dice.choice(kind.questions).format(person=person), answer[0].upper() + answer[1:])


def write_rows(facts: Iterable[Fact], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = ({"question": fact.question, "answer": fact.answer} for fact in facts)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def train_tokenizer(world: World) -> PreTrainedTokenizerFast:
    """A byte-level BPE learnt from the world's own words; being byte-level, it can also read what a user makes up."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = [f"Question: {fact.question}\nAnswer: {fact.answer}" for fact in world.forget + world.retain]
    bpe.train_from_iterator(text, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="<eos>")
