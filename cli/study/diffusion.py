"""Stable Diffusion, taught what one or several things look like."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPModel, CLIPProcessor

from .adapting import PeftWorkload, cut, set_mode, shuffled
from .concepts import Concept, Picture, concept_from_hub, concept_of, concepts_of
from .preset import Preset
from .sources import need
from .workload import Part

DATASETS: Final = ("concept", "concepts")
WEIGHTS: Final = "stable-diffusion-v1-5/stable-diffusion-v1-5"
HUB: Final = "diffusers/dog-example"
HUB_TEXT: Final = "a photo of sks dog"

HELD_OUT: Final[Mapping[Part, int]] = {"validation": -2, "test": -1}
"""Places of a concept's pictures in a part."""

DRAWS: Final = 16
"""Steps at which a held-out picture is judged, evenly spread over the diffusion."""

QUICK_DRAWS: Final = 2
NOISE_SEED: Final = 0
"""Seed of the noise of held-out pictures: the same in every run."""

SAMPLING: Final[Mapping[str, Any]] = {"num_inference_steps": 50, "guidance_scale": 7.0}

PAPER: Final = "Zhang, Pilanci, arXiv:2402.02347, 2024, and their code, "
BEFORE: Final = {
    "betas": (0.9, 0.999),
    "placement": "before",
    "damping": 0.0,
    "damping_mode": "relative",
}
PRESETS: Final[Mapping[str, Preset]] = {
    "concept": Preset(
        source=f"{PAPER}Object_Generation, the rate of the U-Net; 10 000 steps on 5 pictures",
        rank=4,
        alpha=4,
        dropout=0.1,
        batch=1,
        epochs=2000,
        optimizers={
            "AdamW": {"lr": 1e-4, "weight_decay": 0.01},
            "ScaledAdamW": {"lr": 1e-4, "weight_decay": 0.01, **BEFORE},
        },
    ),
    "concepts": Preset(
        source=f"{PAPER}Mix-of-Show, the middle rate of the U-Net",
        rank=4,
        alpha=4,
        dropout=0.0,
        batch=2,
        epochs=500,
        optimizers={
            "AdamW": {"lr": 1e-4, "eps": 1e-6, "weight_decay": 0.01},
            "ScaledAdamW": {"lr": 1e-4, "eps": 1e-6, "weight_decay": 0.01, **BEFORE},
        },
    ),
}

STARTS: Final[Mapping[str, str | bool]] = {"concept": "gaussian", "concepts": True}
"""PEFT's ``init_lora_weights``: A of standard deviation 1/r as in Object_Generation, or uniform."""

TARGETS: Final = (
    r"unet\..*\.(to_q|to_k|to_v|to_out\.0)|text_encoder\..*\.(q_proj|k_proj|v_proj|out_proj)"
)
"""Projections of attention in the denoiser and in the encoder of captions."""


class Batch(NamedTuple):
    """Pictures as latents, their captions, and for held-out ones what is done to them."""

    concept: str
    latents: Tensor  # (batch, channels, height, width)
    ids: Tensor  # (batch, tokens)
    noise: Tensor | None = None  # as the latents
    steps: Tensor | None = None  # (batch,)


class Denoiser(nn.Module):
    """Adapted modules: the U-Net and the encoder of captions."""

    def __init__(self, pipe: Any) -> None:
        super().__init__()
        self.unet, self.text_encoder = pipe.unet, pipe.text_encoder

    def forward(self, noisy: Tensor, steps: Tensor, ids: Tensor) -> Tensor:
        """Say what the noise is, or the velocity, of which the scheduler knows."""
        text = self.text_encoder(ids)[0]
        prediction: Tensor = self.unet(noisy, steps, encoder_hidden_states=text).sample
        return prediction


class DiffusionWorkload(PeftWorkload[Batch]):
    """A pipeline of Stable Diffusion with pictures of concepts."""

    def __init__(
        self,
        pipe: Any,
        concepts: Sequence[Concept],
        preset: Preset,
        start: str | bool = True,
        draws: int = DRAWS,
        clip: str | Path | None = None,
    ) -> None:
        self.pipe, self.concepts, self.draws = pipe, concepts, draws
        self.scheduler = need("diffusers").DDPMScheduler.from_config(pipe.scheduler.config)
        self.judge = Likeness(clip, pipe.device) if clip else None
        batches: dict[Part, list[Batch]] = {
            "train": [b for c in concepts for b in self._training(c, preset.batch)],
        }
        for part, place in HELD_OUT.items():
            batches[part] = [self._held_out(c.name, c.pictures[place]) for c in concepts]
        adapters = {
            "lora_alpha": preset.alpha,
            "lora_dropout": preset.dropout,
            "init_lora_weights": start,
            "target_modules": TARGETS,
        }
        super().__init__(Denoiser(pipe), adapters, batches)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean squared error of what is predicted; new noise and steps where a picture trains."""
        set_mode(model)
        noise, steps = batch.noise, batch.steps
        if noise is None or steps is None:
            noise, steps = torch.randn_like(batch.latents), self._random_steps(batch.latents)
        noisy = self.scheduler.add_noise(batch.latents, noise, steps)
        return functional.mse_loss(
            model(noisy, steps, batch.ids), self._wanted(batch, noise, steps)
        )

    def weight(self, batch: Batch) -> int:
        """Noisy pictures."""
        return len(batch.latents)

    @torch.no_grad()
    def scores(self, model: nn.Module, part: Part) -> dict[str, float]:
        """The loss of every concept, and with CLIP how well pictures fit their captions."""
        scores = {f"loss_{b.concept}": float(self.loss(model, b)) for b in self.batches(part)}
        if self.judge:
            for concept in self.concepts:
                text = concept.pictures[HELD_OUT[part]].text
                scores[f"clip_{concept.name}"] = self.judge(self.drawn(text), text)
        return scores

    @torch.no_grad()
    def drawn(self, text: str) -> Any:
        """Draw a picture with the adapters that are in the base now."""
        set_mode(self.base)
        generator = torch.Generator(self.pipe.device).manual_seed(NOISE_SEED)
        return self.pipe(text, generator=generator, **SAMPLING).images[0]

    def _random_steps(self, latents: Tensor) -> Tensor:
        count = self.scheduler.config.num_train_timesteps
        return torch.randint(count, (len(latents),), device=latents.device)

    def _wanted(self, batch: Batch, noise: Tensor, steps: Tensor) -> Tensor:
        if self.scheduler.config.prediction_type == "v_prediction":
            velocity: Tensor = self.scheduler.get_velocity(batch.latents, noise, steps)
            return velocity
        return noise

    def _training(self, concept: Concept, size: int) -> list[Batch]:
        """With prior pictures, one beside each of the concept's, so that both count alike."""
        own, prior = shuffled(concept.pictures[:-2]), concept.prior
        if prior:
            count = max(len(own), len(prior))
            own = [p for i in range(count) for p in (own[i % len(own)], prior[i % len(prior)])]
            size *= 2
        return [Batch(concept.name, *self._encoded(some)) for some in cut(own, size)]

    def _held_out(self, concept: str, picture: Picture) -> Batch:
        latents, ids = (x.expand(self.draws, *x.shape[1:]) for x in self._encoded([picture]))
        generator = torch.Generator().manual_seed(NOISE_SEED)
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        share = (torch.arange(self.draws) + 0.5) / self.draws
        steps = (share * self.scheduler.config.num_train_timesteps).long().to(latents.device)
        return Batch(concept, latents, ids, noise, steps)

    @torch.no_grad()
    def _encoded(self, pictures: Sequence[Picture]) -> tuple[Tensor, Tensor]:
        """Latents (the mean of what the autoencoder gives) and ids, made once for all runs."""
        pipe = self.pipe
        side = pipe.unet.config.sample_size * pipe.vae_scale_factor
        pixels = pipe.image_processor.preprocess(
            [picture.image for picture in pictures], side, side, resize_mode="crop"
        )
        encoded = pipe.vae.encode(pixels.to(pipe.device, pipe.vae.dtype)).latent_dist.mode()
        tokens = pipe.tokenizer(
            [picture.text for picture in pictures],
            padding="max_length",
            truncation=True,
            max_length=pipe.tokenizer.model_max_length,
            return_tensors="pt",
        )
        return encoded * pipe.vae.config.scaling_factor, tokens.input_ids.to(pipe.device)


class Likeness:
    """CLIP's cosine between a picture and a caption."""

    def __init__(self, weights: str | Path, device: torch.device) -> None:
        model: Any = CLIPModel.from_pretrained(str(weights))
        self.model = model.to(device).eval()
        self.processor: Any = CLIPProcessor.from_pretrained(str(weights))

    @torch.no_grad()
    def __call__(self, image: Any, text: str) -> float:
        inputs = self.processor(text=[text], images=[image], return_tensors="pt", truncation=True)
        output = self.model(**inputs.to(self.model.device))
        return float(functional.cosine_similarity(output.image_embeds, output.text_embeds))


def load(
    dataset: str,
    *,
    weights: str | Path | None = None,
    data: Path | None = None,
    device: str = "cuda",
    quick: bool = False,
    clip: str | Path | None = None,
) -> DiffusionWorkload:
    """Stable Diffusion in float32, and pictures.

    Parameters
    ----------
    dataset : str
        "concept" for one thing to learn, "concepts" for several in one adapter.
    weights : str or Path, optional
        A pipeline of the hub or a folder; `WEIGHTS` if not given.
    data : Path, optional
        For "concept" a folder with three pictures or more and a table ``metadata.jsonl`` (or CSV,
        TSV) with ``file_name`` and ``text``; of these the last picture tests, the one before
        validates. A folder ``prior`` in it, of the same form, has pictures that keep the model
        from forgetting the kind. For "concepts" a folder of such folders. Without it, and for
        "concept" only, the package datasets fetches `HUB`.
    device : str
        Where the model and the batches are.
    quick : bool
        Judge held-out pictures at fewer steps.
    clip : str or Path, optional
        A CLIP model of the hub or a folder, to judge drawn pictures by.

    Returns
    -------
    DiffusionWorkload
        Scored by the loss of each concept, and its likeness by CLIP if asked for.

    Raises
    ------
    ValueError
        When the data are not there or too few.
    ImportError
        When diffusers, Pillow or datasets is not installed.
    """
    if dataset not in DATASETS or (dataset == "concepts" and data is None):
        msg = f'expected "concept", or "concepts" and a folder of data, got {dataset!r} and {data}'
        raise ValueError(msg)
    diffusers = need("diffusers")
    if data is None:
        concepts = [concept_from_hub(HUB, HUB_TEXT)]
    else:
        concepts = concepts_of(data) if dataset == "concepts" else [concept_of(data)]
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(
        str(weights or WEIGHTS), safety_checker=None, requires_safety_checker=False
    ).to(device)
    pipe.set_progress_bar_config(disable=True)
    pipe.vae.requires_grad_(False)
    draws = QUICK_DRAWS if quick else DRAWS
    return DiffusionWorkload(pipe, concepts, PRESETS[dataset], STARTS[dataset], draws, clip)
