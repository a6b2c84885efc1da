"""Prompts with a modifier token, against a tokenizer and text encoder that were really extended."""

import copy

import pytest
import torch

from weaver.concepts.concept import Concept
from weaver.concepts.encoding import encode
from weaver.concepts.own_prompts import own_prompts
from weaver.concepts.prompts import PromptError, derive_prompt, tokenize

PATH = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
PROMPTS = [
    "",
    "a cat",
    "A  Cat,and a DOG on two beaches!",
    "a red dog playing with a ball, mountain background",
    "a cat and " * 20,
]


def make_concept(vectors=1, token="<v1>", word="cat", width=16):
    generator = torch.Generator().manual_seed(vectors)
    delta = torch.zeros(2, 2)
    return Concept(
        name="tuxedo",
        token=token,
        word=word,
        base_hash="0" * 64,
        embeddings={"text_encoder": torch.randn(vectors, width, generator=generator)},
        deltas={f"{PATH}.to_k": delta, f"{PATH}.to_v": delta},
    )


def extended(pipe, concept):
    """The reference: a copy of tokenizer and text encoder with the token's vectors as new words."""
    tokenizer, encoder = copy.deepcopy(pipe.tokenizer), copy.deepcopy(pipe.text_encoder)
    vectors = concept.embeddings["text_encoder"]
    names = [concept.token if i == 0 else f"{concept.token}_{i}" for i in range(len(vectors))]
    tokenizer.add_tokens(names)
    encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        encoder.get_input_embeddings().weight[-len(names) :] = vectors
    return lambda prompt: encoder(
        tokenizer(
            prompt.replace(concept.token, " ".join(names)),
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
    )[0]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_without_a_concept_equals_diffusers(tiny_pipe, prompt):
    expected = tiny_pipe.encode_prompt(prompt, "cpu", 1, False)[0]
    assert torch.equal(encode(tiny_pipe, prompt).text, expected)


@pytest.mark.parametrize("vectors", [1, 3])
@pytest.mark.parametrize(
    "prompt",
    [
        "<v1>",
        "a <v1> cat",
        "a <v1> cat, <v1> cat!",
        "a dog and a <v1>cat,beach background",
        "<v1> cat and a dog playing with a ball, on a green mountain background",
    ],
)
@torch.no_grad()
def test_with_a_concept_equals_a_really_extended_encoder(tiny_pipe, prompt, vectors):
    concept = make_concept(vectors)
    torch.testing.assert_close(encode(tiny_pipe, prompt, concept).text, extended(tiny_pipe, concept)(prompt))


def test_the_token_changes_the_encoding(tiny_pipe):
    concept = make_concept()
    with_token = encode(tiny_pipe, "a <v1> cat", concept).text
    assert with_token.shape == (1, tiny_pipe.tokenizer.model_max_length, 16)
    assert not torch.allclose(with_token[:, 2:], encode(tiny_pipe, "a dog cat").text[:, 2:])


def test_tokenizer_and_text_encoder_stay_as_they_are(tiny_pipe):
    tokenizer, encoder = tiny_pipe.tokenizer, tiny_pipe.text_encoder
    size, probe = len(tokenizer), tokenizer("a <v1> cat").input_ids
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    encode(tiny_pipe, "a <v1> cat", make_concept(3))
    assert len(tokenizer) == size
    assert tokenizer("a <v1> cat").input_ids == probe
    after = encoder.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not encoder.get_input_embeddings()._forward_hooks


def test_hook_comes_off_after_an_exception(tiny_pipe):
    with pytest.raises(RuntimeError):
        encode(tiny_pipe, "a <v1> cat", make_concept(width=5))
    assert not tiny_pipe.text_encoder.get_input_embeddings()._forward_hooks


def test_token_missing_from_its_prompt(tiny_pipe):
    with pytest.raises(PromptError, match="token '<v1>' is not in its prompt 'a cat': put it before the class word"):
        encode(tiny_pipe, "a cat", make_concept())


def test_a_plain_word_as_token_is_not_found_inside_other_words(tiny_pipe):
    concept = make_concept(token="sks")
    encode(tiny_pipe, "a sks cat", concept)
    with pytest.raises(PromptError, match="not in its prompt"):
        encode(tiny_pipe, "a sksy cat", concept)


def test_token_behind_the_last_position_read(tiny_pipe):
    with pytest.raises(PromptError, match="lies behind the 16 tokens"):
        encode(tiny_pipe, "a dog and " * 6 + "a <v1> cat", make_concept())


@pytest.mark.parametrize(
    ("prompt", "room"), [("a <v1> cat", 13), ("a <v1> and a <v1> cat", 5), ("<v1> cat" + " and a dog" * 9, 14)]
)
def test_more_vectors_than_there_is_room_for(tiny_pipe, caplog, prompt, room):
    """The number that is told is the largest that is read: of 16 tokens two are the text's begin and end."""
    with pytest.raises(
        PromptError, match=rf"for 90 vectors, and the prompt .* room for {room} of them in the 16 tokens"
    ):
        tokenize(tiny_pipe, prompt, "<v1>", 90)
    assert not caplog.text
    assert len(tokenize(tiny_pipe, prompt, "<v1>", room)[1]) == room * prompt.count("<v1>")
    with pytest.raises(PromptError, match=f"take {room} vectors or fewer"):
        tokenize(tiny_pipe, prompt, "<v1>", room + 1)


def test_a_cut_prompt_is_told(tiny_pipe, caplog):
    encode(tiny_pipe, "a <v1> cat and " + "a dog and " * 6, make_concept())
    assert "is cut to the 16 tokens" in caplog.text


def test_derive_prompt_puts_the_token_before_the_class_word():
    concept = make_concept()
    assert derive_prompt("A dog and a cat playing", concept) == "A dog and a <v1> cat playing"
    assert derive_prompt("Cat, beach", concept) == "<v1> Cat, beach"
    for token in ("<bg>", "[bg]"):  # and the paper's
        ground = make_concept(word="mountain background", token=token)
        assert derive_prompt("a cat, mountain background", ground) == f"a cat, {token} mountain background"


def test_derive_prompt_counts_occurrences():
    assert derive_prompt("a cat and a cat", make_concept(), occurrence=1) == "a cat and a <v1> cat"
    with pytest.raises(PromptError, match="names 'cat' 2 times, concept 'tuxedo' needs number 3"):
        derive_prompt("a cat and a cat", make_concept(), occurrence=2)


def test_a_word_within_anothers_longer_one_is_no_place_of_its_own():
    bear, polar = make_concept(word="bear"), make_concept(word="polar bear", token="<v2>")
    assert own_prompts("a polar bear and a bear", [bear, polar]) == ["a <v1> bear", "a <v2> polar bear"]
    goat, hills = make_concept(word="mountain goat"), make_concept(word="mountain", token="<bg>")
    found = own_prompts("a mountain goat, mountain background", [goat], hills)
    assert found == ["a <v1> mountain goat, mountain background", "a mountain goat, <bg> mountain background"]
    (lacking,) = own_prompts("a mountain goat", [], hills)
    assert lacking == "a <bg> mountain goat"  # nobody else is meant by it
    assert "names 'mountain' 0 times" in str(own_prompts("a mountain goat", [goat], hills)[1])


def test_derive_prompt_takes_whole_words_only():
    with pytest.raises(PromptError, match="names 'cat' 0 times"):
        derive_prompt("a catalogue of cats", make_concept())


BALL = "A dog and a cat playing with a ball, mountain background"
THREE = "a dog, a cat and a fox, beach background"


@pytest.mark.parametrize(
    ("prompt", "word", "occurrence", "without", "expected"),
    [
        (BALL, "dog", 0, ["cat"], "A <v1> dog playing with a ball, mountain background"),
        (BALL, "cat", 0, ["dog"], "a <v1> cat playing with a ball, mountain background"),
        (THREE, "dog", 0, ["cat", "fox"], "a <v1> dog, beach background"),
        (THREE, "cat", 0, ["dog", "fox"], "a <v1> cat, beach background"),
        (THREE, "fox", 0, ["dog", "cat"], "a <v1> fox, beach background"),
        ("a cat and a cat at night", "cat", 1, ["cat"], "a <v1> cat at night"),
        ("a small red dog and an old cat at night", "cat", 0, ["dog"], "an old <v1> cat at night"),
        ("a small red dog and an old cat at night", "dog", 0, ["cat"], "a small red <v1> dog at night"),
        ("a photo of a cat and a dog", "cat", 0, ["dog"], "a photo of a <v1> cat"),
        ("a dog chasing a cat", "cat", 0, ["dog"], "a dog chasing a <v1> cat"),
        ("a dog chasing a cat", "dog", 0, ["cat"], "a <v1> dog chasing a cat"),
        ("a cat and a catfish", "cat", 0, ["fish"], "a <v1> cat and a catfish"),
        ("a cat and a dog, a dog house behind", "cat", 0, ["dog"], "a <v1> cat, a dog house behind"),
        ("a cat and a fox, fox forest background", "cat", 0, ["fox"], "a <v1> cat, fox forest background"),
        ("a cat and a dog painting", "cat", 0, ["dog"], "a <v1> cat and a dog painting"),
        ("a dog house and a cat", "cat", 0, ["dog"], "a dog house and a <v1> cat"),
        ("a cat and a dog sitting outdoors.", "cat", 0, ["dog"], "a <v1> cat sitting outdoors."),
        ("a cat and a dog near a tree", "cat", 0, ["dog"], "a <v1> cat near a tree"),
        ("a cat and a dog, photo", "cat", 0, ["dog"], "a <v1> cat, photo"),
    ],
)
def test_derive_prompt_leaves_other_concepts_out_of_lists(prompt, word, occurrence, without, expected):
    concept = make_concept(word=word)
    assert derive_prompt(prompt, concept, occurrence=occurrence, without=without) == expected
