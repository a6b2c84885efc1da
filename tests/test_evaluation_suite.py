"""The suite: what it holds, and that the sweep sees none of it. The arms: what each changes."""

from __future__ import annotations

from collections import Counter

import pytest

from weaver.embedded.catalog import CONCEPTS
from weaver.errors import WeaverError
from weaver.evaluation.arms import ARMS, FULL, PARTS, arm_of, default_settings
from weaver.evaluation.suite import GROUPS, SEEDS, cases, quick_cases, suite, sweep_cases


def test_the_table_has_what_it_promises():
    prompts = suite()
    assert len(prompts) >= 60 and len(SEEDS) == 3 and len(cases()) == 3 * len(prompts)
    assert {prompt.group for prompt in prompts} == set(GROUPS)
    assert {len(prompt.concepts) for prompt in prompts} == {1, 2, 3, 4}
    assert len({(p.animals, p.ground, p.layout) for p in prompts}) == len({p.name for p in prompts}) == len(prompts)
    assert {name for prompt in prompts for name in (*prompt.concepts, prompt.background) if name} == set(CONCEPTS)
    layouts = Counter(prompt.layout for prompt in prompts)
    assert layouts["touching"] >= 6 and layouts["overlapping"] >= 6


def test_similar_prompts_have_two_animals_of_one_class():
    similar = [prompt for prompt in suite() if prompt.group == "similar"]
    assert all(len(set(prompt.words)) == 1 and len(prompt.animals) == 2 for prompt in similar)
    assert {len(prompt.concepts) for prompt in similar} == {1, 2}  # beside the base model's own, and twice
    assert {("tuxedo-cat", "cat"), ("tuxedo-cat", "tuxedo-cat")} <= {prompt.animals for prompt in similar}
    assert {prompt.words[0] for prompt in similar} == {card.word for card in CONCEPTS.values() if card.kind == "animal"}


def test_the_sweep_has_neither_a_prompt_nor_a_seed_of_the_table():
    def seen(of):
        return {case.prompt.text_with_tokens for case in of}

    assert {case.prompt.group for case in sweep_cases()} == set(GROUPS)
    assert not seen(sweep_cases()) & seen(cases())
    assert not {case.seed for case in sweep_cases()} & {case.seed for case in cases()}
    assert seen(quick_cases()) <= seen(cases())


def test_a_prompt_names_tokens_only_where_it_is_to():
    prompt = next(p for p in suite() if p.background and len(p.concepts) == 2)
    assert "<" not in prompt.text
    assert all(prompt.text_with_tokens.count(f"{CONCEPTS[n].token} ") == 1 for n in (*prompt.concepts, prompt.ground))
    words = [word for word in prompt.text_with_tokens.split() if not word.startswith("<")]
    assert " ".join(words) == prompt.text


def test_each_arm_differs_from_the_full_method_in_one_thing():
    full = arm_of(FULL).settings(default_settings())
    assert full == default_settings()
    changed = {}
    for arm in ARMS:
        own = arm.settings(full)
        if own.kind == "fused":
            changed[arm.name] = [name for name in vars(full) if getattr(own, name) != getattr(full, name)]
    assert changed.pop("no-injection") == ["resnet_window", "attention_window", "injected"]
    assert changed.pop(FULL) == []
    expected = {"shared-prompt": "shared_prompt", "dense-masks": "dilation", "cross-attention": "parts"}
    for name, setting in expected.items():
        assert changed.pop(name) == [setting]
    assert changed.pop("no-suppression") == ["suppression"]
    assert not changed


def test_parts_are_changed_one_at_a_time_and_have_no_settings_of_their_own():
    full = default_settings()
    changed = {arm.name: {n for n in vars(full) if getattr(arm.chosen, n) != getattr(full, n)} for arm in PARTS}
    assert changed.pop("full-no-injection") == {"injected", "resnet_window", "attention_window"}
    assert sorted(map(len, changed.values())) == [1] * len(changed) and len(set.union(*changed.values())) == 5
    assert not any(arm.swept for arm in PARTS) and len({arm.letter for arm in (*ARMS, *PARTS)}) == len(ARMS + PARTS)


def test_plain_prompts_have_no_setting_of_fusion():
    plain = arm_of("averaged").settings(default_settings()).as_mapping()
    assert set(plain) == {"kind", "guidance", "merge"} and arm_of("averaged").swept == ("guidance",)
    assert arm_of("closed-form").settings(default_settings()).merge == "closed-form"
    assert "suppression" not in arm_of("score-mix").swept and "suppression" not in arm_of("no-suppression").swept
    assert arm_of(FULL).swept == ("guidance", "suppression", "eta", "resnet_window", "attention_window", "dilation")


def test_an_unknown_arm_is_told():
    with pytest.raises(WeaverError, match="no arm 'best': choose of averaged"):
        arm_of("best")
