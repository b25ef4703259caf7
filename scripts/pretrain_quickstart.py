"""Pre-train the small ViT that ships in `vitopt/assets/vit-quickstart`.

    python scripts/pretrain_quickstart.py --data /usr/share/datasets/fashion-mnist

The data is Fashion-MNIST (MIT licence, Xiao et al., arXiv 1708.07747): the four `*-ubyte.gz` files from
https://github.com/zalandoresearch/fashion-mnist or Debian's package `dataset-fashion-mnist`.
About 20 minutes on two CPU cores; the last line printed is the test accuracy, which the model card carries.
"""

import argparse
import gzip
import json
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import (
    EvalPrediction,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    set_seed,
)

CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
SHIFT = 2  # pixels of random translation


def read_idx(path: Path) -> torch.Tensor:
    """Read one gzipped IDX file of bytes: shape from its header, dtype uint8."""
    raw = gzip.decompress(path.read_bytes())
    dimensions = raw[3]
    shape = np.frombuffer(raw, ">i4", dimensions, offset=4)
    values = np.frombuffer(raw, np.uint8, offset=4 + 4 * dimensions)
    return torch.from_numpy(values.reshape(shape).copy())


class FashionMnist(Dataset):
    """`pixel_values`: (3, 28, 28) in [-1, 1]; training images are mirrored and shifted at random."""

    def __init__(self, folder: Path, split: str, augment: bool):
        self.images = read_idx(folder / f"{split}-images-idx3-ubyte.gz")
        self.labels = read_idx(folder / f"{split}-labels-idx1-ubyte.gz").long()
        self.augment = augment

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict:
        image = self.images[index]
        if self.augment:
            if torch.rand(()) < 0.5:
                image = image.flip(-1)
            padded = torch.nn.functional.pad(image, (SHIFT,) * 4)
            top, left = torch.randint(0, 2 * SHIFT + 1, (2,)).tolist()
            image = padded[top : top + 28, left : left + 28]
        return {"pixel_values": (image / 127.5 - 1).expand(3, -1, -1), "labels": self.labels[index]}


def accuracy(output: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((output.predictions.argmax(-1) == output.label_ids).mean())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with the four *-ubyte.gz files")
    parser.add_argument("--output", type=Path, default=Path("vitopt/assets/vit-quickstart"))
    parser.add_argument("--epochs", type=float, default=12)
    arguments = parser.parse_args()
    set_seed(0)

    # 128 wide so that every quantization block size divides it; 6 blocks so that a skip list has a choice.
    config = ViTConfig(
        image_size=28,
        patch_size=4,
        hidden_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        intermediate_size=256,
        id2label=dict(enumerate(CLASSES)),
        label2id={name: index for index, name in enumerate(CLASSES)},
    )
    model = ViTForImageClassification(config)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir="/tmp/pretrain-quickstart",
            num_train_epochs=arguments.epochs,
            per_device_train_batch_size=128,
            per_device_eval_batch_size=500,
            learning_rate=1e-3,
            lr_scheduler_type="cosine",
            warmup_steps=500,
            weight_decay=0.05,
            label_smoothing_factor=0.1,
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
            eval_strategy="epoch",
            save_strategy="no",
            logging_steps=200,
            report_to="none",
            seed=0,
        ),
        train_dataset=FashionMnist(arguments.data, "train", augment=True),
        eval_dataset=FashionMnist(arguments.data, "t10k", augment=False),
        compute_metrics=accuracy,
    )
    trainer.train()
    print(json.dumps(trainer.evaluate()))
    # Half precision on disk: it halves the package and costs no accuracy that 10,000 images can show.
    model.half().save_pretrained(arguments.output)
    processor = ViTImageProcessor(size={"height": 28, "width": 28}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    processor.save_pretrained(arguments.output)


if __name__ == "__main__":
    main()
