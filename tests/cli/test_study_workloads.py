"""The workloads for a GPU, on tiny models of the same architectures with weights drawn at random."""

import inspect
import math
import sys

import numpy as np
import pytest
import torch
from torch.nn import functional

pytest.importorskip("peft")
pytest.importorskip("transformers")

import tiny_workloads
from transformers import AutoModelForCausalLM

from rlora.cli.study import concepts, diffusion, glue, gpt2, mistral, runner, sources, texts
from rlora.cli.study.plan import Records
from rlora.cli.study.workloads import Place
from rlora.torch import ScaledAdamW

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
]

ANSWERED = [
    ("name : Eagle | Type : pub | food : French", " Eagle has French food."),
    ("name : Eagle | Type : pub | food : Thai", " Eagle has Thai food."),
]
RTE = [
    {"sentence1": f"The {x} is red.", "sentence2": f"A {y} is red.", "label": int(x != y)}
    for x in ("sun", "fox", "car", "tea", "hat")
    for y in ("sun", "fox", "car", "tea")
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models and data of every workload."""
    root = tmp_path_factory.mktemp("workloads")
    tiny_workloads.e2e(root / "e2e")
    tiny_workloads.sums(root / "gsm8k")
    for name, suffix in (("rte", "tsv"), ("stsb", "jsonl")):
        tiny_workloads.write_table(root / name / f"train.{suffix}", RTE)
        tiny_workloads.write_table(root / name / f"validation.{suffix}", RTE[3:9])
    for seed, name in enumerate(("dog", "vase")):
        tiny_workloads.concept(root / "concepts" / name, seed=seed)
    tiny_workloads.concept(root / "concepts" / "dog" / "prior", count=4, seed=9)
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder with the weights of a model, made when they are first asked for."""
    root, made = tmp_path_factory.mktemp("weights"), {}
    makers = {
        "gpt2": lambda path: tiny_workloads.gpt2(path, ANSWERED),
        "mistral": tiny_workloads.mistral,
        "diffusion": tiny_workloads.stable_diffusion,
    }

    def of(name):
        if name not in made:
            made[name] = makers[name](root / name)
        return made[name]

    return of


WORKLOADS = {
    "e2e": gpt2,
    "rte": mistral,
    "stsb": mistral,
    "gsm8k": mistral,
    "concept": diffusion,
    "concepts": diffusion,
}
NEEDS = {gpt2: ["sacrebleu"], mistral: ["bitsandbytes", "accelerate"], diffusion: ["diffusers"]}


@pytest.fixture(scope="module")
def load(folder, weights):
    """Load a workload on the CPU; its data are in the folder of its name, if not said otherwise."""

    def of(dataset, data=None, **options):
        module = WORKLOADS[dataset]
        for package in NEEDS[module]:
            pytest.importorskip(package)
        data = data or folder / ("concepts/dog" if dataset == "concept" else dataset)
        name = module.__name__.rpartition(".")[2]
        return module.load(dataset, weights=weights(name), data=data, device="cpu", **options)

    return of


@pytest.fixture(scope="module")
def workloads(load):
    """Each workload once for the whole file: every test leaves it as it was."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mistral, "RECIPE", mistral.RECIPE._replace(decoding={"max_new_tokens": 8}))
        loaded = {}

        def of(dataset):
            if dataset not in loaded:
                loaded[dataset] = load(dataset)
            return loaded[dataset]

        yield of


EVERY = pytest.mark.parametrize("dataset", WORKLOADS)


def loss_of(workload, model, batch):
    with torch.no_grad():
        return workload.loss(model, batch).item()


def adapters(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


@EVERY
def test_a_workload_learns_and_is_left_as_it_was(workloads, dataset):
    workload = workloads(dataset)
    base = {
        n: p.clone() for n, p in workload.base.state_dict().items() if isinstance(p, torch.Tensor)
    }
    model = workload.adapted(4, seed=0)
    (seen, other) = workload.parts["train"][0], workload.parts["validation"][0]
    if isinstance(seen, diffusion.Batch):
        seen = other  # its noise stays the same
    before = loss_of(workload, model, seen)
    optimizer = ScaledAdamW(model, lr=1e-2)
    assert not optimizer.report.plain
    assert not optimizer.report.refused
    for _ in range(20):
        workload.loss(model, seen).backward()
        optimizer.step()
        optimizer.zero_grad()
    # Of a denoiser drawn at random, only attention learns, on pictures that are nearly noise.
    assert (
        loss_of(workload, model, seen)
        < (0.99 if WORKLOADS[dataset] is diffusion else 0.95) * before
    )
    for part in ("validation", "test"):
        scores = workload.scores(model, part)
        assert scores
        assert all(math.isfinite(score) for score in scores.values())
    workload.release(model)
    left = workload.base.state_dict()
    assert [n for n, p in left.items() if isinstance(p, torch.Tensor)] == list(base)
    assert all(torch.equal(left[name], tensor) for name, tensor in base.items())


@EVERY
def test_the_seed_decides_on_the_adapters(workloads, dataset):
    workload, made = workloads(dataset), []
    for rank, seed in ((4, 0), (4, 0), (4, 1), (2, 0)):
        model = workload.adapted(rank, seed)
        made.append(adapters(model))
        workload.release(model)
    first, again, other, thin = made
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    assert {x.shape[0] for name, x in thin.items() if "lora_A" in name} == {2}
    assert all(not x.any() for name, x in first.items() if "lora_B" in name)


@EVERY
def test_evaluation_repeats_and_does_not_disturb_training(workloads, dataset):
    """Also in 4 bits, where a CPU stores weights otherwise for evaluation."""
    workload = workloads(dataset)
    model = workload.adapted(4, seed=0)
    batch, gradients = workload.parts["validation"][0], []
    for _ in range(2):
        torch.manual_seed(5)
        workload.loss(model, batch).backward()
        gradients.append(
            {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
        )
        model.zero_grad()
        first, second = loss_of(workload, model, batch), loss_of(workload, model, batch)
        assert first == second
    # The same weights in bfloat16, which has 8 bits, unpacked from either of two layouts.
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0.05, atol=1e-4)
    workload.release(model)


@EVERY
def test_the_weighted_mean_over_pieces_is_the_mean_over_the_whole(workloads, dataset):
    workload = workloads(dataset)
    model, whole = workload.adapted(4, seed=0), workload.parts["test"][0]

    def piece(rows):
        return type(whole)(*(x[rows] if isinstance(x, torch.Tensor) else x for x in whole))

    pieces = [piece(slice(0, 1)), piece(slice(1, None))]
    weights = [workload.weight(x) for x in pieces]
    assert sum(weights) == workload.weight(whole)
    mean = np.average([loss_of(workload, model, x) for x in pieces], weights=weights)
    # Mistral multiplies in bfloat16, which has 8 bits.
    precision = 1e-2 if WORKLOADS[dataset] is mistral else 1e-5
    assert loss_of(workload, model, whole) == pytest.approx(mean, rel=precision)
    workload.release(model)


@pytest.mark.parametrize("module", [gpt2, mistral, diffusion])
def test_modules_have_one_face(module):
    names = list(inspect.signature(module.load).parameters)
    assert names == ["dataset", "weights", "data", "device", "quick"]
    assert set(module.PRESETS) == set(module.DATASETS)


def lora_layer():
    layer = torch.nn.Module()
    layer.lora_A = torch.nn.Parameter(torch.randn(2, 3))
    layer.lora_B = torch.nn.Parameter(torch.zeros(4, 2))
    return layer


@pytest.mark.parametrize(
    "preset",
    [
        pytest.param(preset, id=f"{module.__name__.rpartition('.')[2]}-{name}")
        for module in (gpt2, mistral, diffusion)
        for name, preset in module.PRESETS.items()
    ],
)
def test_published_optimizers_can_be_made(preset):
    for name, arguments in preset.optimizers.items():
        layer = lora_layer()
        optimizer = preset.optimizer(name, layer, arguments["lr"])
        assert type(optimizer).__name__ == name
        group = optimizer.param_groups[0]
        assert {k: v for k, v in arguments.items() if k in group} == {
            k: group[k] for k in arguments if k in group
        }
        assert {"lr", "weight_decay"} <= group.keys() & arguments.keys()
        (layer.lora_B @ layer.lora_A - 1).square().sum().backward()
        optimizer.step()
        assert layer.lora_B.any()


# ---------------------------------------------------------------- the command


def test_the_study_runs_the_papers_own_settings(rlora_cli, tmp_path, folder, weights):
    pytest.importorskip("sacrebleu")
    names = ("paper-AdamW", "paper-ScaledAdamW")
    done = rlora_cli(
        *("study", "--model", "gpt2", "--dataset", "e2e", "--device", "cpu", "--quick"),
        *("--weights", weights("gpt2"), "--data", folder / "e2e", "--output", tmp_path),
        *(x for name in names for x in ("--method", name)),
    )
    assert done.exit_code == 0, done.output
    rows = Records(tmp_path / "gpt2-e2e.jsonl").rows
    assert {(job.method, job.rank) for job in rows} == {(name, 4) for name in names}
    assert {job.lr for job in rows} >= {1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3}
    tested = [row for job, row in rows.items() if job.tested]
    assert [set(row["test"]) for row in tested] == [{"loss", "bleu", "chrf"}] * 2
    assert ",paper-ScaledAdamW," in (tmp_path / "results.csv").read_text()


def test_a_run_is_as_long_as_the_papers(tmp_path, folder, weights):
    """Five epochs of the 14 rows in batches of 8, at rank 4."""
    pytest.importorskip("sacrebleu")
    place = Place("gpt2", tmp_path, weights=str(weights("gpt2")), data=folder / "e2e")
    job, size = runner.measure(place, "e2e", rank=None, steps=None)
    assert (job.rank, job.steps, size.steps) == (4, 10, 10)
    job, _ = runner.measure(place, "e2e", rank=2, steps=3)
    assert (job.rank, job.steps) == (2, 3)
    assert runner.usual("gpt2", "e2e", quick=False) == tuple(
        f"paper-{name}" for name in ("AdamW", "ScaledAdamW", "SGD", "ScaledSGD")
    )


# ---------------------------------------------------------------- GPT-2 and E2E


def test_prompts_are_spelled_as_in_the_lora_paper():
    mr = "name[The Vaults], eatType[pub], priceRange[more than £30], customer rating[5 out of 5]"
    wanted = "name : The Vaults | Type : pub | price : more than £30 | customer rating : 5 out of 5"
    assert gpt2.prompt(mr) == wanted
    assert gpt2.prompt("name[A, B], familyFriendly[no]") == "name : A, B | family friendly : no"


def test_separate_projections_give_what_the_merged_one_gives(workloads, weights):
    workload = workloads("e2e")
    ids = workload.parts["test"][0].ids
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(weights("gpt2")).eval()(ids).logits
        apart = workload.base.eval()(ids).logits
    # Sums of 32 float32 products in another order.
    torch.testing.assert_close(apart, merged, rtol=1e-4, atol=1e-4)
    model = workload.adapted(4, seed=0)
    layers = {name.split(".lora_")[0].rpartition(".")[2] for name in adapters(model)}
    assert layers == {"q_proj", "v_proj"}
    workload.release(model)


def test_a_model_that_knows_the_answers_says_them(workloads):
    """Through prompts of two lengths, beams, the end of a text, and BLEU of two references."""
    workload = workloads("e2e")
    model = workload.adapted(4, seed=0)
    said = workload.answers(model, [prompt for prompt, _ in ANSWERED])
    assert said == [answer.strip() for _, answer in ANSWERED]
    assert workload.scores(model, "test")["bleu"] == pytest.approx(100)
    assert workload.scores(model, "validation")["bleu"] < 100
    workload.release(model)


def test_the_loss_is_that_of_the_answers_and_smoothed_in_training_only(workloads):
    workload = workloads("e2e")
    model = workload.adapted(4, seed=0)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    batch = workload.parts["train"][0]
    with torch.no_grad():
        logs = functional.log_softmax(workload.base(batch.ids).logits.double(), -1)
    nll, flat = [], []
    for row, targets in zip(logs, batch.targets, strict=True):
        for log, target in zip(row, targets, strict=True):
            if target != texts.IGNORE:
                nll.append(-log[target].item())
                flat.append(-log.mean().item())
    assert workload.weight(batch) == len(nll)
    # float32 against float64, of numbers around 5
    assert loss_of(workload, model, batch) == pytest.approx(np.mean(nll), rel=1e-5)
    smoothed = 0.9 * np.mean(nll) + 0.1 * np.mean(flat)
    assert workload.loss(model, batch).item() == pytest.approx(smoothed, rel=1e-5)
    workload.release(model)


def test_targets_are_the_answer_and_the_end():
    batch = texts.right_padded([([7, 8, 9], [1, 2, 0]), ([7], [3, 0])], torch.device("cpu"))
    no = texts.IGNORE
    assert batch.ids.tolist() == [[7, 8, 9, 1, 2, 0], [7, 3, 0, 0, 0, 0]]
    assert batch.targets.tolist() == [[no, no, 1, 2, 0, no], [3, 0, no, no, no, no]]


def test_no_repeats_looks_at_the_answer_only():
    """After 1 2 3 in the prompt, 1 2 3 may come once in the answer, and not twice."""
    rule, scores = texts.NoRepeats(3, start=4), torch.zeros(1, 6)
    assert rule(torch.tensor([[1, 2, 3, 4, 1, 2]]), scores).isfinite().all()
    banned = rule(torch.tensor([[1, 2, 3, 4, 1, 2, 3, 5, 1, 2]]), scores)
    assert banned.isinf().nonzero().tolist() == [[0, 3]]


def test_overlap_takes_the_reference_that_fits():
    pytest.importorskip("sacrebleu")
    answers = ["the cat sat on the mat", "a dog barked at the door"]
    references = [["A cat is here", "The cat sat on the mat"], ["a dog barked at the door"]]
    assert gpt2.overlap(answers, references)["bleu"] == pytest.approx(100)
    assert gpt2.overlap(answers, [references[0][:1], references[1]])["bleu"] < 90
    assert gpt2.overlap(answers, references)["chrf"] > 90


# ---------------------------------------------------------------- Mistral


def test_mistral_is_in_four_bits_but_for_its_head(workloads):
    for dataset, head in (("rte", "score"), ("gsm8k", "lm_head")):
        workload = workloads(dataset)
        kinds = {name: type(module).__name__ for name, module in workload.base.named_modules()}
        four = {name.rpartition(".")[2] for name, kind in kinds.items() if kind == "Linear4bit"}
        assert set(mistral.TARGETS) < four
        assert kinds[head] == "Linear"
        layer = workload.base.model.layers[0].self_attn.q_proj
        assert layer.weight.quant_type == "nf4"
        assert layer.weight.dtype == torch.uint8
        assert layer.compute_dtype == torch.bfloat16


def test_published_figures_are_of_the_test_part(workloads):
    """GLUE's validation part; what chooses the learning rate is cut from the training part."""
    workload = workloads("rte")
    count = {
        part: sum(workload.weight(b) for b in workload.parts[part])
        for part in ("train", "validation", "test")
    }
    assert count == {"train": 18, "validation": 2, "test": 6}


def test_rows_held_out_are_a_tenth_and_no_others():
    rows = [{"x": i} for i in range(57)]
    for most, count in ((1000, 5), (3, 3)):
        train, held = sources.hold_out(rows, most)
        assert len(held) == count
        assert sorted(train + held, key=lambda row: row["x"]) == rows
    with pytest.raises(ValueError, match="9 rows are too few"):
        sources.hold_out(rows[:9], 1000)


def test_metrics_of_glue():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 2, (2, 50))
    mine = glue.correlation(torch.tensor(x), torch.tensor(y))
    assert mine == pytest.approx(metrics.matthews_corrcoef(x, y))
    a, b = rng.standard_normal((2, 50))
    mine = glue.correlation(torch.tensor(a), torch.tensor(b))
    assert mine == pytest.approx(np.corrcoef(a, b)[0, 1])
    assert glue.correlation(torch.ones(4), torch.tensor([0, 1, 1, 0])) == 0


@pytest.mark.parametrize("label", [1, "1", "not_entailment"])
def test_labels_by_number_or_by_name(label):
    assert glue.label_of(label, glue.TASKS["rte"].labels) == 1


def test_labels_that_are_none():
    with pytest.raises(ValueError, match="one of entailment, not_entailment, got -1"):
        glue.label_of(-1, glue.TASKS["rte"].labels)
    assert glue.label_of("3.25", glue.TASKS["stsb"].labels) == 3.25


@pytest.mark.parametrize(
    "answer, number",
    [
        ("So it is 7.\n#### 7", 7),
        ("#### 1,234", 1234),
        ("#### $3.50 in all", 3.5),
        ("#### -12", -12),
        ("It is 7.", None),
        ("####", None),
    ],
)
def test_final_numbers(answer, number):
    assert mistral.number(answer) == number


def test_answers_without_a_number_are_wrong():
    said, wanted = ["#### 7", "seven", "#### 8.0"], [["#### 7"], ["#### 7"], ["#### 8"]]
    assert mistral.accuracy(said, wanted) == {"accuracy": 2 / 3}


# ---------------------------------------------------------------- Stable Diffusion


def test_held_out_pictures_meet_the_same_noise_in_every_run(workloads, load):
    workload, again = workloads("concepts"), load("concepts")
    for batch, same in zip(workload.parts["test"], again.parts["test"], strict=True):
        assert torch.equal(batch.noise, same.noise)
        assert len(set(batch.steps.tolist())) == diffusion.DRAWS
    model = workload.adapted(4, seed=0)
    batch = workload.parts["train"][0]
    torch.manual_seed(3)
    first, second = loss_of(workload, model, batch), loss_of(workload, model, batch)
    torch.manual_seed(3)
    assert loss_of(workload, model, batch) == first != second
    workload.release(model)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_loss_is_that_of_ddpm(load, tmp_path, folder, prediction):
    pytest.importorskip("diffusers")
    workload = diffusion.load(
        "concept",
        weights=tiny_workloads.stable_diffusion(tmp_path / "sd", prediction),
        data=folder / "concepts/vase",
        device="cpu",
        quick=True,
    )
    model, batch = workload.adapted(4, seed=0), workload.parts["test"][0]
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    kept = torch.tensor(np.cumprod(1 - betas)[batch.steps]).reshape(-1, 1, 1, 1)
    noisy = kept.sqrt() * batch.latents + (1 - kept).sqrt() * batch.noise
    velocity = kept.sqrt() * batch.noise - (1 - kept).sqrt() * batch.latents
    with torch.no_grad():
        said = workload.base(noisy.float(), batch.steps, batch.ids)
    wanted = batch.noise if prediction == "epsilon" else velocity
    # float32 against float64, of numbers around 1
    assert loss_of(workload, model, batch) == pytest.approx(
        (said - wanted).square().mean().item(), rel=1e-4
    )
    workload.release(model)


def test_prior_pictures_stand_beside_those_of_the_concept(workloads):
    workload = workloads("concepts")
    dog = [b for b in workload.parts["train"] if b.concept == "dog"]
    vase = [b for b in workload.parts["train"] if b.concept == "vase"]
    texts_of = [workload.pipe.tokenizer.batch_decode(b.ids, skip_special_tokens=True) for b in dog]
    assert texts_of == [["a photo of dog", "a photo of prior"] * 2] * 2  # 3 pictures, 4 priors
    assert [len(b.latents) for b in vase] == [2, 1]


def test_scores_are_told_by_concept(workloads):
    workload = workloads("concepts")
    model = workload.adapted(4, seed=0)
    assert set(workload.scores(model, "test")) == {"loss_dog", "loss_vase"}
    workload.release(model)


def test_several_concepts_are_in_a_folder():
    with pytest.raises(ValueError, match="give a folder of folders with --data"):
        diffusion.load("concepts", device="cpu")


def test_too_few_pictures_are_refused(tmp_path):
    tiny_workloads.concept(tmp_path / "cat", count=2)
    with pytest.raises(ValueError, match="cat must have 3 pictures or more, got 2"):
        concepts.concept_of(tmp_path / "cat")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="a folder for each concept"):
        concepts.concepts_of(tmp_path / "empty")


# ---------------------------------------------------------------- tables


@pytest.mark.parametrize("suffix", ["jsonl", "tsv", "csv"])
def test_tables_of_every_format(tmp_path, suffix):
    rows = [{"mr": "name[A], food[B]", "ref": "A, of course"}, {"mr": "name[Café]", "ref": "é"}]
    tiny_workloads.write_table(tmp_path / f"x.{suffix}", rows)
    assert sources.from_folder(tmp_path, "x") == rows


def test_data_that_are_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"expected one of x\.jsonl, x\.tsv, x\.csv .* no folder"):
        sources.from_folder(tmp_path / "nowhere", "x")
    (tmp_path / "x.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="has no rows"):
        sources.from_folder(tmp_path, "x")
    with pytest.raises(ValueError, match="row 2 lacks ref; it has mr"):
        sources.columns([{"mr": "a", "ref": "b"}, {"mr": "c"}], "mr", "ref")


def test_a_missing_package_is_named_with_a_remedy(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"datasets.*pip install 'rlora\[study-gpu\]'"):
        sources.from_hub("csv", None, "train")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The package datasets with a cache of this test, so that it reads folders as it would a hub."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    return tmp_path / "hub"


def as_on_the_hub(folder, config, files):
    """A data set with a named configuration."""
    listed = "".join(f"  - split: {s}\n    path: {f}\n" for s, f in files.items())
    (folder / "README.md").write_text(
        f"---\nconfigs:\n- config_name: {config}\n  data_files:\n{listed}---\n"
    )
    return str(folder)


def test_without_data_the_hub_is_asked(hub, monkeypatch, folder):
    monkeypatch.setattr(gpt2, "ORIGIN", str(folder / "e2e"))
    for part, stem in gpt2.STEMS.items():
        assert gpt2.rows_of(part, None) == sources.from_folder(folder / "e2e", stem)

    for name in ("train", "validation"):
        tiny_workloads.write_table(hub / f"{name}.jsonl", RTE if name == "train" else RTE[:4])
    files = {"train": "train.jsonl", "validation": "validation.jsonl", "test": "validation.jsonl"}
    monkeypatch.setattr(mistral, "GLUE_HUB", as_on_the_hub(hub, "rte", files))
    assert mistral.parts_of("rte", None, quick=False) == mistral.parts_of("rte", hub, quick=False)

    tiny_workloads.sums(hub / "gsm8k")
    files = {"train": "train.jsonl", "test": "test.jsonl"}
    monkeypatch.setattr(mistral, "GSM8K_HUB", as_on_the_hub(hub / "gsm8k", "main", files))
    rows = mistral.parts_of("gsm8k", None, quick=True)
    assert rows == mistral.parts_of("gsm8k", hub / "gsm8k", quick=True)


def test_pictures_of_the_hub_have_one_caption(hub):
    made = tiny_workloads.concept(hub / "dog-example")
    concept = concepts.concept_from_hub(str(made), "a photo of sks dog")
    assert concept.name == "dog-example"
    assert {picture.text for picture in concept.pictures} == {"a photo of sks dog"}
    assert [np.array(p.image).tolist() for p in concept.pictures] == [
        np.array(p.image).tolist() for p in concepts.concept_of(made).pictures
    ]
