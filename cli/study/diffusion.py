"""Stable Diffusion, taught what one or several things look like."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from .concepts import Concept, Picture, concept_from_hub, concept_of, concepts_of
from .preset import ExperimentPreset
from .sources import need
from .workload import Part, Workload, cut, set_mode, shuffled

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

BEFORE: Final = {
    "betas": (0.9, 0.999),
    "placement": "before",
    "damping": 0.0,
    "damping_mode": "relative",
}


def preset(dropout: float, batch: int, epochs: int, eps: float) -> ExperimentPreset:
    """The settings of one of the two experiments; rank 4, a learning rate of 1e-4."""
    adamw: dict[str, Any] = {"lr": 1e-4, "eps": eps, "weight_decay": 0.01}
    optimizers = {"AdamW": adamw, "ScaledAdamW": {**adamw, **BEFORE}}
    return ExperimentPreset(4, 4, dropout, batch, epochs, optimizers)


PRESETS: Final[Mapping[str, ExperimentPreset]] = {
    "concept": preset(dropout=0.1, batch=1, epochs=2000, eps=1e-8),
    "concepts": preset(dropout=0.0, batch=2, epochs=500, eps=1e-6),
}
"""Zhang, Pilanci, arXiv:2402.02347, 2024, and their code: Object_Generation, the rate of the U-Net,
10 000 steps on 5 pictures; Mix-of-Show, the middle rate of the U-Net."""

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


class DiffusionWorkload(Workload[Batch]):
    """A pipeline of Stable Diffusion with pictures of concepts."""

    def __init__(
        self,
        pipe: Any,
        concepts: Sequence[Concept],
        preset: ExperimentPreset,
        start: str | bool = True,
        draws: int = DRAWS,
    ) -> None:
        self.pipe, self.concepts, self.draws = pipe, concepts, draws
        self.scheduler = need("diffusers").DDPMScheduler.from_config(pipe.scheduler.config)
        batches: dict[Part, list[Batch]] = {
            "train": [b for c in concepts for b in self._training(c, preset.batch)],
        }
        for part, place in HELD_OUT.items():
            batches[part] = [self._held_out(c.name, c.pictures[place]) for c in concepts]
        adapters = {"init_lora_weights": start, "target_modules": TARGETS, **preset.adapters}
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
        """The loss of every concept."""
        return {f"loss_{b.concept}": float(self.loss(model, b)) for b in self.parts[part]}

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


def load(
    dataset: str,
    *,
    weights: str | Path | None = None,
    data: Path | None = None,
    device: str = "cuda",
    quick: bool = False,
) -> DiffusionWorkload:
    """Stable Diffusion in float32, and pictures of one thing, or of several in one adapter.

    Weights are a pipeline of the hub or a folder, `WEIGHTS` if not given; data a folder as
    `concepts.concept_of` reads it, or one of such folders. Without data the package datasets
    fetches `HUB`. A quick workload judges held-out pictures at fewer steps.
    """
    if dataset == "concepts" and data is None:
        msg = "concepts are pictures of one's own: give a folder of folders with --data"
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
    return DiffusionWorkload(pipe, concepts, PRESETS[dataset], STARTS[dataset], draws)
