"""`python -m sdlora.bases.mini.build`: builds the weights of `mini` and of its judge from openly licensed art."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from .art import PACKAGES

RECIPE = """
the art, once:
  npm install --prefix ART emojibase-data {packages}

stages, in order (each resumes where it stopped; run the same command again):
  vae      the autoencoder
  unet     the latents of all looks, the tokenizer, then the text encoder and the UNet
  decoder  the autoencoder's decoder alone, further, on the same latents
  judge    the image-text encoder that says what a picture shows
  datasets the sample folders datasets/{{ink,clay,cat}}
  export   the diffusers folder sdlora/bases/mini/weights, fp16
""".format(packages=" ".join(f"@iconify-json/{p}" for p in PACKAGES))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m sdlora.bases.mini.build",
        description=__doc__,
        epilog=RECIPE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("stage", choices=("vae", "unet", "decoder", "judge", "datasets", "export"))
    parser.add_argument("--art", type=Path, required=True, help="folder with the npm packages' node_modules")
    parser.add_argument("--work", type=Path, default=Path("build/mini"), help="states and caches (default build/mini)")
    parser.add_argument("--steps", type=int, help="default: the shipped weights' number for the stage")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--learning-rate", type=float, help="peak (default 0.001; judge 0.002)")
    parser.add_argument("--from-shipped", action="store_true", help="unet, judge: train what ships further")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    build_stage(args)


def build_stage(args: argparse.Namespace) -> None:
    """Runs one stage with the parsed flags."""
    from .export import export_mini, learn_tokenizer, take_shipped
    from .pictures import render_all
    from .unet import encode_pool, train_unet, trained_things
    from .vae import load_vae, reconstruction_db, train_vae

    pictures = render_all(args.art, args.work)
    if args.stage == "vae":
        vae = train_vae(pictures, args.work, steps=args.steps or 2700, seed=args.seed)
        print(f"PSNR over every tenth picture: {reconstruction_db(vae, pictures.pixels[::10]):.2f} dB")
    elif args.stage == "unet":
        shipped = take_shipped(args.work) if args.from_shipped else None
        tokenizer = learn_tokenizer(pictures, args.art, args.work)
        pool = encode_pool(pictures, args.art, load_vae(args.work, "vae"), args.work, args.seed)
        things = trained_things(pictures)
        settings = {"steps": args.steps or 9000, "seed": args.seed, "device": args.device, "shipped": shipped}
        train_unet(pool, things, tokenizer, args.work, learning_rate=args.learning_rate or 1e-3, **settings)
    elif args.stage == "decoder":
        vae = train_vae(
            pictures, args.work, steps=args.steps or 2000, seed=args.seed + 1, decoder_only=True, name="decoder"
        )
        print(f"PSNR over every tenth picture: {reconstruction_db(vae, pictures.pixels[::10]):.2f} dB")
    elif args.stage == "judge":
        from .judge import FOLDER, export_judge, train_judge
        from .judge_figures import publish_judge

        settings = {"steps": args.steps or 3000, "seed": args.seed, "learning_rate": args.learning_rate or 2e-3}
        train_judge(pictures, args.art, args.work, shipped=FOLDER if args.from_shipped else None, **settings)
        export_judge(args.work)
        publish_judge(pictures, args.art, args.work)
    elif args.stage == "datasets":
        from .datasets import write_datasets

        write_datasets(pictures, Path("datasets"), args.seed)
    else:
        export_mini(args.work)


if __name__ == "__main__":
    main()
