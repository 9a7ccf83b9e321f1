"""PyTorch: the same network by plain Adam, by the trainer, and in a loop of one's own.

Needs ``pip install "priorityprop_jax[examples,torch]"``. Trains a small network on real
images three times from the same start on the same batches, and prints the test
accuracy, the updates that were spent, and who got them:

    python examples/torch_quickstart.py
    python examples/torch_quickstart.py --data-dir mnist --budget 0.25
"""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from _data import argument_parser, load_images
from priorityprop_jax.torch import PriorityBudget, PriorityPropTrainer


def number(text: str) -> int | float:
    """An integer is a number of updates per cycle, a float a share of all of them."""
    return int(text) if text.isdigit() else float(text)


def plain(model, optimizer, loss_fn, dataloader, args):
    for _ in range(args.epochs):
        for x, y in dataloader:
            optimizer.zero_grad()
            loss_fn(model(x), y).backward()
            optimizer.step()


def by_trainer(model, optimizer, loss_fn, dataloader, args):
    trainer = PriorityPropTrainer(
        model=model,
        optimizer=optimizer,
        loss_fn=loss_fn,
        total_budget=args.budget,
        min_updates=1,
        max_updates=20,
        recalc_every=10,
    )
    trainer.train(dataloader, epochs=args.epochs)
    return trainer.get_priority_report()


def by_loop(model, optimizer, loss_fn, dataloader, args):
    budget = PriorityBudget(model, optimizer, budget=args.budget)
    for _ in range(args.epochs):
        for x, y in dataloader:
            with budget.step():
                loss_fn(model(x), y).backward()
                optimizer.step()
    return budget.report()


def main():
    parser = argument_parser(__doc__)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--budget", type=number, default=0.5, help="0.5, or 20 a cycle")
    args = parser.parse_args()
    args.epochs = 1 if args.quick else args.epochs
    data = load_images(args.data_dir)
    images, labels, test_images, test_labels = (
        torch.from_numpy(x if x.ndim == 1 else x.reshape(len(x), -1)) for x in data
    )
    train_set = TensorDataset(images, labels.long())
    features, classes = images.shape[1], data.classes

    report = None
    print(f"{'':30}{'test accuracy':>14}{'updates':>10}")
    for name, train in {
        "Adam": plain,
        "PriorityPropTrainer": by_trainer,
        "a loop with PriorityBudget": by_loop,
    }.items():
        torch.manual_seed(args.seed)
        model = nn.Sequential(
            nn.Linear(features, 256), nn.ReLU(), nn.Linear(256, classes)
        )
        optimizer = torch.optim.Adam(model.parameters())
        order = torch.Generator().manual_seed(args.seed)
        dataloader = DataLoader(train_set, 64, shuffle=True, generator=order)
        report = train(model, optimizer, nn.CrossEntropyLoss(), dataloader, args)
        updates = args.epochs * len(dataloader) * len(list(model.parameters()))
        if report is not None:
            updates = report.updates
        with torch.no_grad():
            predicted = model(test_images).argmax(1)
        accuracy = float((predicted == test_labels).float().mean())
        print(f"{name:30}{accuracy:14.2%}{updates:10,}")

    print(f"\n{name} gave its updates to:\n{report}\n")
    one = 1 / len(test_labels)
    print(f"One run each (seed {args.seed}); one test image is {one:.2%} of accuracy.")


if __name__ == "__main__":
    main()
