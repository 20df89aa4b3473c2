"""A museum of famous bugs. None of them raised an error, and each was published and used.

Every exhibit has the wrong line, the right line of this house, and the test that tells them apart: the wrong one must
fail it, else the exhibit would prove nothing. Read one, cover the right line, and say what is wrong with the other.
"""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import lora
import ppo
import rm
import sft
import zero
from data import run, text
from model import Llama, LlamaConfig

TINY = LlamaConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, ffn_dim=48, vocab_size=64, max_seq_len=32)


def tiny(seed: int = 0) -> Llama:
    return Llama(TINY, generator=torch.Generator().manual_seed(seed))


def examples(lengths: list[int], seed: int = 0) -> list[tuple[list[int], list[bool]]]:
    """Random rows of ids; all but the first are learnt."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(3, TINY.vocab_size, (n,), generator=generator).tolist() for n in lengths]
    return [(row, [False] + [True] * (len(row) - 1)) for row in rows]


# ---- losses ---------------------------------------------------------------------------------------------------------

@pytest.mark.lesson
def test_labels_of_another_batch():
    """Coati v0.2.8 drew the ptx batch by three calls of next(iter(loader)): ids of one batch, labels of a second.

    With a shuffled loader the model was taught to answer one question with the answer to another, at a loss that falls
    all the same, because answers in general become likelier. One draw gives both.
    """
    model, loader = tiny(), iter([examples([9, 7], seed=1), examples([9, 7], seed=2)])

    def wrong() -> torch.Tensor:
        tokens, _, target = text.collate(next(loader))
        labels, _, _ = text.collate(next(loader))               # the bug
        logp = model(tokens).log_softmax(-1)[:, :-1].gather(-1, labels[:, 1:, None]).squeeze(-1)
        return -(logp * target[:, 1:]).sum()

    def right() -> torch.Tensor:
        tokens, _, target = text.collate(examples([9, 7], seed=1))
        return sft.lm_loss(model, tokens, target)

    one_by_one = sum(F.cross_entropy(model(torch.tensor([ids]))[0, :-1], torch.tensor(ids[1:]), reduction="sum")
                     for ids, _ in examples([9, 7], seed=1))
    assert torch.allclose(right(), one_by_one, rtol=1e-5)
    assert not torch.allclose(wrong(), one_by_one, rtol=1e-2)


@pytest.mark.lesson
def test_mean_of_means():
    """Averaging the means of micro-batches, which transformers' Trainer did until October 2024.

    A micro-batch of few target tokens then weighs as much as one of many, and the loss depends on --accumulation_steps.
    Sums are added up and divided once, by the number of target tokens of the whole step.
    """
    model, batch = tiny(), examples([21, 20, 4, 3])
    micro_batches = [text.collate(batch[:2]), text.collate(batch[2:])]

    def wrong() -> torch.Tensor:
        return sum(sft.lm_loss(model, tokens, target) / target.sum() for tokens, _, target in micro_batches) / 2

    def right() -> torch.Tensor:
        targets = sum(target.sum() for *_, target in micro_batches)
        return sum(sft.lm_loss(model, tokens, target) for tokens, _, target in micro_batches) / targets

    tokens, _, target = text.collate(batch)
    at_once = sft.lm_loss(model, tokens, target) / target.sum()
    assert torch.allclose(right(), at_once, rtol=1e-5)
    assert not torch.allclose(wrong(), at_once, rtol=1e-3)


@pytest.mark.lesson
def test_eos_that_is_never_learnt():
    """Masking EOS out of the targets, because it has the id of the padding (pad_token = eos_token).

    Every loss over answers looks fine, and the model never stops. Masks come from lengths, never from comparing ids.
    """
    eos, answer = 2, [5, 6, 7, 2]
    rows = [([1, *answer], [False] + [True] * 4), ([1, 5, 2], [False, True, True])]
    tokens, _, target = text.collate(rows, filler=eos)

    def wrong() -> torch.Tensor:
        return tokens != eos                                    # the bug: EOS and padding are one id

    assert target[0].tolist() == [False, True, True, True, True]            # EOS of the answer is learnt
    assert target[1].tolist() == [False, True, True, False, False]          # padding is not, though its id is the same
    assert not wrong()[0, -1]


@pytest.mark.lesson
def test_logarithm_of_a_sigmoid():
    """Coati v0.2.8's ranking loss, -log(sigmoid(chosen - rejected)): infinite once the sigmoid underflows."""
    chosen, rejected = torch.tensor([0.0, 0.0]), torch.tensor([1.0, 200.0])

    def wrong() -> torch.Tensor:
        return -torch.log(torch.sigmoid(chosen - rejected))

    exact = torch.tensor([math.log1p(math.e), 200.0])           # log(1 + exp(200)) = 200 to 80 digits
    assert torch.allclose(rm.log_sig(chosen, rejected), exact) and torch.allclose(rm.log_exp(chosen, rejected), exact)
    assert not wrong().isfinite().all()


# ---- reward model ---------------------------------------------------------------------------------------------------

@pytest.mark.lesson
def test_head_that_scores_the_padding():
    """Reading the score at the last column of a padded batch: a shorter answer is judged by its padding.

    The score depends on how long the other answers of the batch are. Read it at each row's own last token.
    """
    model = rm.RewardModel(Llama(TINY, head=False, generator=torch.Generator().manual_seed(0)))
    rows = [[1, 10, 11, 12, 13, 2], [1, 20, 2]]
    tokens, mask = text.pad(rows)

    def wrong() -> torch.Tensor:
        return model.values(tokens)[:, -1]

    alone = torch.stack([model(torch.tensor([row]), torch.ones(1, len(row), dtype=torch.bool))[0] for row in rows])
    assert torch.allclose(model(tokens, mask), alone, atol=1e-5)
    assert not torch.allclose(wrong(), alone, atol=1e-3)


# ---- PPO ------------------------------------------------------------------------------------------------------------

@pytest.mark.lesson
def test_k3_upside_down():
    """Coati v0.2.8 and minChatGPT built k3 from pi / ref: exp(d) - 1 - d with d = log(pi / ref).

    It looks the same, is never negative too, and estimates another number. k3 of samples of pi needs ref / pi.
    """
    pi = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05])
    ref = torch.tensor([0.1, 0.2, 0.2, 0.2, 0.3])
    logp, ref_logp = pi.log(), ref.log()

    def wrong() -> torch.Tensor:
        return (logp - ref_logp).exp() - 1 - (logp - ref_logp)

    exact = (pi * (logp - ref_logp)).sum()                      # the expectation over pi, by enumeration
    assert torch.allclose((pi * ppo.kl_k3(logp, ref_logp)).sum(), exact)
    assert torch.allclose((pi * ppo.kl_k1(logp, ref_logp)).sum(), exact)
    assert not torch.allclose((pi * wrong()).sum(), exact, rtol=0.1)


@pytest.mark.lesson
def test_whitening_that_adds_the_mean_back():
    """torchtune's whiten(x, shift_mean=True) returned (x - mean) / std + mean, the opposite of OpenAI's it cites.

    Advantages then are not centred, and with a positive mean every token that was sampled becomes likelier.
    """
    adv, mask = torch.tensor([[3.0, 5.0, 4.0]]), torch.ones(1, 3, dtype=torch.bool)

    def wrong() -> torch.Tensor:
        return (adv - adv.mean()) / adv.std(unbiased=False) + adv.mean()

    assert abs(ppo.masked_mean(ppo.whiten(adv, mask), mask)) < 1e-6
    assert abs(ppo.masked_mean(wrong(), mask)) > 1


@pytest.mark.lesson
def test_whitening_over_padding():
    """Mean and deviation over a padded tensor: the zeros of padding count as advantages.

    Answers of a batch with one long answer are then shifted and scaled by how long that one is.
    """
    adv, mask = torch.tensor([[3.0, 5.0, 4.0]]), torch.ones(1, 3, dtype=torch.bool)
    padded, padded_mask = F.pad(adv, (0, 9)), F.pad(mask, (0, 9))

    def wrong() -> torch.Tensor:
        return (padded - padded.mean()) / (padded.std(unbiased=False) + 1e-8)

    alone = ppo.whiten(adv, mask)
    assert torch.allclose(ppo.whiten(padded, padded_mask)[:, :3], alone, atol=1e-6)
    assert not torch.allclose(wrong()[:, :3], alone, atol=0.1)


@pytest.mark.lesson
def test_value_beyond_the_end_of_an_answer():
    """GAE over a padded batch without a mask: the critic's value of padding is taken for the value of the next state.

    An answer that is over has no next state: the value after its last token is 0.
    """
    reward, value = torch.tensor([[0.0, 1.0, 0.0]]), torch.tensor([[0.5, 0.5, 9.0]])  # two tokens, and one of padding
    mask = torch.tensor([[True, True, False]])

    def wrong() -> torch.Tensor:
        adv = torch.zeros(3)
        for t in (2, 1, 0):
            beyond = t + 1 < 3
            following = value[0, t + 1] if beyond else 0.0
            adv[t] = reward[0, t] + following - value[0, t] + 0.95 * (adv[t + 1] if beyond else 0.0)
        return adv

    adv, _ = ppo.gae(reward, value, mask, gamma=1.0, lam=0.95)
    last = 1.0 + 0.0 - 0.5                                      # by hand: reward + value after the end - value
    first = (0.0 + 0.5 - 0.5) + 0.95 * last
    assert torch.allclose(adv, torch.tensor([[first, last, 0.0]]))
    assert abs(wrong()[1] - last) > 0.3


@pytest.mark.lesson
def test_value_loss_that_ignores_its_mask():
    """Coati v0.2.8's ValueLoss took an action mask and never used it: the critic learnt to predict padding."""
    value, ret = torch.tensor([[1.0, 2.0, 50.0]]), torch.tensor([[1.5, 2.5, 0.0]])
    mask = torch.tensor([[True, True, False]])

    def wrong() -> torch.Tensor:
        return 0.5 * (value - ret).square().mean()

    assert torch.allclose(ppo.value_loss(value, value, ret, mask, clip=0.4), torch.tensor(0.5 * 0.25))
    assert wrong() > 100


# ---- LoRA, several processes ----------------------------------------------------------------------------------------

@pytest.mark.lesson
def test_unmerging_by_subtraction():
    """The authors' LoRA merges in eval() and subtracts B A again in train(): in bf16, W + B A - B A is not W.

    PPO changes between the two at every step, so the frozen base drifts. Keep the original and put it back.
    """
    model = tiny().to(torch.bfloat16)
    lora.attach(model, rank=4, generator=torch.Generator().manual_seed(0))
    layer = model.layers[0].attention.wq
    layer.lora_B.data.normal_(generator=torch.Generator().manual_seed(1))
    original = layer.base.weight.detach().clone()

    def wrong() -> torch.Tensor:
        product = (layer.alpha / layer.rank * layer.lora_B @ layer.lora_A).to(torch.bfloat16)
        return original + product - product

    lora.merge(model)
    assert not torch.equal(layer.base.weight, original)
    lora.unmerge(model)
    assert torch.equal(layer.base.weight, original)
    assert not torch.equal(wrong(), original)


def unreduced(folder: Path) -> None:
    """One of two processes that share a batch: saves the model after the wrong and after the right step."""
    world = run.start("cpu", "ddp")
    batch = examples([12, 9])
    tokens, _, target = text.collate(batch[world.rank::world.world])
    targets = sum(sum(flags) for _, flags in batch)
    wrong, right = tiny(), tiny()
    (sft.lm_loss(wrong, tokens, target) / targets).backward()  # the bug: nothing sums gradients over processes
    torch.optim.SGD(wrong.parameters(), lr=0.1).step()
    optimizer = zero.ZeRO2(right.named_parameters(), max_norm=0.0)
    optimizer.backward(sft.lm_loss(right, tokens, target) / targets)
    optimizer.step(1e-3)
    torch.save({"wrong": wrong.state_dict(), "right": right.state_dict()}, folder / f"{world.rank}.pt")
    run.stop()


def test_gradients_that_nobody_sums(tmp_path, start):
    """minimind's PPO called model.module(...) under DistributedDataParallel: the wrapper's reducer never ran.

    Every process trained a model of its own, silently, and the first one was saved. After a step all must be equal.
    """
    for process in start(2, unreduced, tmp_path).wait():
        assert process.code == 0, process.err
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]

    def distance(kind: str) -> float:
        return max((a - b).abs().max().item() for a, b in zip(*(rank[kind].values() for rank in ranks)))
    assert distance("right") == 0
    assert distance("wrong") > 1e-4
