"""Papers that several claims are from."""

from typing import Final

PRECONDITIONED: Final = (
    "F. Zhang, M. Pilanci. Riemannian Preconditioned LoRA for Fine-Tuning Foundation Models. "
    "arXiv:2402.02347, 2024"
)
RITE: Final = (
    "J.-N. Yen, S. Si, Z. Meng, F. Yu, S. S. Duvvuri, I. S. Dhillon, C.-J. Hsieh, S. Kumar. "
    "LoRA Done RITE. arXiv:2410.20625, 2024"
)
LORA_ONE: Final = (
    "Y. Zhang, F. Liu, Y. Chen. LoRA-One: One-Step Full Gradient Could Suffice for Fine-Tuning "
    "Large Language Models, Provably and Efficiently. arXiv:2502.01235, 2025"
)
LORA_PLUS: Final = (
    "S. Hayou, N. Ghosh, B. Yu. LoRA+: Efficient Low Rank Adaptation of Large Models. "
    "arXiv:2402.12354, 2024"
)
