"""The ground of claims about text-to-image models: what is drawn, how it is named, what the denoiser can do."""

from __future__ import annotations

import torch

from claims._pictures import CONCEPTS, ID, SEED, STEPS, WORDS, denoiser, draw, judge, outline, record, right, score


def _drawn(count: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    return draw(count, torch.Generator().manual_seed(seed))


def test_shapes_are_what_they_are_called() -> None:
    y, x = torch.meshgrid(torch.arange(-3, 4), torch.arange(-3, 4), indexing="ij")
    rows = [["".join(".#"[int(p)] for p in row) for row in outline(shape, x, y)] for shape in range(4)]
    assert rows[0] == ["#######"] * 7
    assert rows[1] == ["..###..", ".#####.", *["#######"] * 3, ".#####.", "..###.."]
    assert rows[2] == ["..###.."] * 2 + ["#######"] * 3 + ["..###.."] * 2
    assert rows[3] == ["#######"] * 2 + ["##...##"] * 3 + ["#######"] * 2


def test_the_judge_names_real_pictures_right_and_hears_a_wrong_word() -> None:
    pictures, words, covered = _drawn(60)
    assert torch.equal(judge(pictures), words)
    assert torch.equal(judge(pictures + 0.4 * torch.randn(pictures.shape, generator=torch.Generator())), words)
    assert right(pictures, words) == dict.fromkeys(CONCEPTS, 1.0)
    wrong = words.clone()
    wrong[:, 0] = torch.where(words[:, 0] == ID["red"], ID["blue"], ID["red"])
    assert right(pictures, wrong) == {"colour": 0.5, "shape": 1.0, "ground": 1.0}
    there = words[:, [0, 2]] != ID["nothing"]
    assert torch.equal(covered.flatten(2).any(-1), there), "a thing is where words say so"
    assert not covered[:, 0, :, 8:].any()
    assert not covered[:, 1, :, :8].any()
    assert set(words.flatten().tolist()) == set(range(1, len(WORDS)))


def test_no_two_seeds_draw_the_same() -> None:
    drawn = [_drawn(4, seed)[0] for seed in range(6)]
    assert all(not torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])


def test_the_shipped_denoiser_draws_what_it_is_told() -> None:
    told = record()
    assert (told["steps"], told["seed"]) == (str(STEPS), str(SEED)), "the file is another training's: train it again"
    found = score(denoiser(), count=40)
    for concept in CONCEPTS:  # 40 pictures miss the record by 0.15 in one test of a thousand at most
        assert abs(found[concept] - float(told[concept])) < 0.2
    assert found["colour"] > 0.7, "by chance 0.25"
