"""All that a run learns from: the pictures of its data folder, with their masks, and class pictures."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..config import Recipe
from ..errors import DataError
from .buckets import Cuts, count, describe_crops, name_few, plan_cuts, read_bucketing
from .drawn import FOLDER, check_place, describe_drawn, list_drawn
from .folder import Example, Problem, Survey, describe_problems, digest, survey_folder
from .masks import ALPHA, Places, add_masks, digest_masks, place_crops
from .variants import describe_wordings, list_wordings

_MOST_NAMED = 4
"""How many buckets one message names."""


@dataclass(frozen=True)
class Material:
    """What a recipe's run learns from."""

    folder: Path
    examples: list[Example]
    """The pictures of the data folder."""
    masks: list[float] = field(default_factory=list)
    """How much of each picture its mask keeps, where there are masks."""
    masks_unused: list[str] = field(default_factory=list)
    """Masks that belong to no picture."""
    prior: Material | None = None
    """The class pictures that are given."""
    left_out: list[Problem] = field(default_factory=list)
    """What was wrong with the pictures and rows that skip_bad left out."""
    drawn: int = 0
    """How many of the examples, the last ones, the base draws itself; their files need not be there yet."""

    def classes(self, recipe: Recipe, side_px: int, run: Path) -> Material | None:
        """The class pictures, those that are given and those that the base draws into the run folder; None without any.

        Raises: ConfigError where the run folder is within the folder of the given ones.
        """
        place = run / FOLDER
        given = self.prior.examples if self.prior else []
        drawn = list_drawn(recipe, given, side_px, place)
        if self.prior is None:
            return Material(place, drawn, drawn=len(drawn)) if drawn else None
        if drawn:
            check_place(self.prior.folder, place)
        return replace(self.prior, examples=given + drawn, drawn=len(drawn))

    def cut(self, recipe: Recipe, side_px: int, repeats: list[int] | None = None, processes: int = 1) -> Cuts:
        """Every picture's cut; `repeats` is how often each counts, its own where None.

        Raises: DataError where one leaves nothing of a mask, or a bucket is too small; else as `read_bucketing`.
        """
        cuts = plan_cuts(self.examples, read_bucketing(recipe, side_px))
        if repeats is not None:
            cuts = replace(cuts, repeats=tuple(repeats))
        self.place(recipe, cuts)
        problems = find_short_buckets(self.folder, cuts, recipe, processes)
        if problems:
            raise DataError(describe_problems(self.folder, problems))
        return cuts

    def place(self, recipe: Recipe, cuts: Cuts) -> Places | None:
        """Where random crops lie, as `place_crops` says. Raises: DataError where a cut leaves nothing of a mask."""
        places, problems = place_crops(recipe, self.examples, cuts)
        if problems:
            raise DataError(describe_problems(self.folder, problems))
        return places

    def origin(self) -> dict[str, str | None]:
        """The digest of each part, by what a message calls it; None for a part that is not there."""
        return {
            "pictures or captions": digest(self.examples),
            "masks": digest_masks(self.examples),
            "class pictures or their captions (class_data)": digest(self.prior.examples) if self.prior else None,
        }

    def settings(self, recipe: Recipe) -> dict[str, str]:
        """What a LoRA's file says of folders that the recipe names: their contents' digests, and no path."""
        masks = ALPHA if recipe.masks == ALPHA else digest_masks(self.examples)
        named = {"masks": masks, "class_data": digest(self.prior.examples) if self.prior else None}
        return {name: value for name, value in named.items() if value}


def class_recipe(recipe: Recipe) -> Recipe:
    """The recipe as it is for class pictures: no trigger, mask or validation, and draws by a seed of their own."""
    own = hashlib.sha256(f"{recipe.seed}/class".encode()).digest()
    default = Recipe()
    without = ["trigger", "masks", "mask_outside", "validation_share", "validate_every"]
    without += ["class_data", "class_prompt", "class_images", "prior_weight"]
    values = {name: getattr(default, name) for name in without}
    return replace(recipe, seed=int.from_bytes(own[:8], "big") >> 1, **values)


def survey_data(folder: str | Path, recipe: Recipe) -> Survey:
    """Looks at everything in the data folder, its masks, and the class pictures; notes problems, raises none."""
    masks = [Path(recipe.masks)] if recipe.masks not in ("", ALPHA) else []
    prior = [Path(recipe.class_data)] if recipe.class_data else []
    lines = recipe.caption_lines
    survey = survey_folder(folder, recipe.trigger, caption_lines=lines, leave_out=_locate([*masks, *prior]))
    add_masks(survey, recipe.masks)
    for root in prior:
        survey.prior = survey_folder(root, caption_lines=lines, leave_out=_locate([*masks, survey.folder]))
        survey.problems += [_of_class(problem, root) for problem in survey.prior.problems]
        if _locate([root]) & _locate([survey.folder]):
            problem = "is the data folder itself, and cannot be its class pictures too"
            survey.problems.append(Problem(str(root), problem, "give another folder with class_data (--class-data)"))
    if recipe.skip_bad:
        leave_out_bad(survey, recipe)
    return survey


def find_short_buckets(folder: Path, cuts: Cuts, recipe: Recipe, processes: int = 1) -> list[Problem]:
    """The buckets that cannot fill a step without showing a picture twice in it, as one problem, or none.

    A folder that is one bucket is what the person gave, whatever its size: that is no problem.
    """
    together = recipe.images_per_step * processes
    short = [] if recipe.small_buckets else cuts.list_short(together)
    if not short:
        return []
    found = []
    for width, height in short[:_MOST_NAMED]:
        names = [cuts.names[i] for i in cuts.members((width, height)) if cuts.repeats[i]]
        found.append(f"{width} x {height} px has {cuts.images((width, height))} ({name_few(names, 2)})")
    more = f", and {len(short) - _MOST_NAMED} more" if len(short) > _MOST_NAMED else ""
    these = "a bucket has" if len(short) == 1 else f"{len(short)} buckets have"
    problem = (
        f"{these} fewer images an epoch than the {together} of a step, so that a step would show one twice: "
        f"{', '.join(found)}{more}"
    )
    side_px, wider = cuts.bucketing.resolution_px, cuts.bucketing.step_px * 2
    coarser = f", a bucket_step_px of {wider}" if wider <= side_px // 2 and side_px % wider == 0 else ""
    fix = (
        f"give a smaller batch_size or accumulation{coarser}, more repeats (a subfolder called {together}_name), "
        "or allow it with small_buckets = true (--small-buckets)"
    )
    return [Problem(str(folder), problem, fix)]


def _of_class(problem: Problem, root: Path) -> Problem:
    """A problem of the class folder, as it is said among those of the data folder."""
    if problem.file == str(root):
        return replace(problem, fix="check class_data (--class-data)" if "path" in problem.fix else problem.fix)
    fix = problem.fix.replace(", or give --trigger", "")  # class pictures get none
    return Problem(str(root / problem.file), problem.problem, fix)


def gather(folder: str | Path, recipe: Recipe) -> Material:
    """All that a run with this recipe learns from, each picture decoded once to be sure of it.

    Raises: DataError, one line that lists every problem.
    """
    survey = survey_data(folder, recipe)
    if survey.problems:
        raise DataError(describe_problems(survey.folder, survey.problems) + hint_at_skipping(survey, recipe))
    prior = Material(survey.prior.folder, survey.prior.examples) if survey.prior else None
    masks = list(survey.masks.values())
    return Material(survey.folder, survey.examples, masks, survey.masks_unused, prior, survey.left_out)


def leave_out_bad(survey: Survey, recipe: Recipe) -> None:
    """Takes pictures and rows that have a problem out of a survey; the problems of whole folders stay.

    One of which nothing is left is such a problem.
    """
    roots = _name_roots(survey, recipe)
    bad = [problem for problem in survey.problems if problem.file not in roots]
    survey.left_out = bad
    survey.problems = [problem for problem in survey.problems if problem.file in roots]
    for part in (survey, survey.prior):
        if part is None:
            continue
        names = {problem.file for problem in (bad if part is survey else part.problems)}
        kept = [example for example in part.examples if example.name not in names]
        if part is survey and recipe.masks:  # a mask's problem is called after the mask
            kept = [example for example in kept if example.mask is not None]
        if part.pictures and not kept:
            listed = describe_problems(part.folder, bad).removeprefix(f"{part.folder}: ")
            survey.problems.append(Problem(str(part.folder), f"has no picture left: {listed}", "mend or replace some"))
        part.examples = kept
        part.masks = {name: share for name, share in part.masks.items() if name not in names}


def hint_at_skipping(survey: Survey, recipe: Recipe) -> str:
    """What to add to a survey's problems where the run could go on without what they are about; else nothing."""
    roots = _name_roots(survey, recipe)
    names = {problem.file for problem in survey.problems}
    if recipe.skip_bad or names & roots or all(example.name in names for example in survey.examples):
        return ""
    return "; or go on without them with skip_bad = true (--skip-bad)"


def describe_left_out(left_out: list[Problem]) -> list[str]:
    """A line for each thing that skip_bad left out, with its reason."""
    return [f"left out {problem.file}: {problem.problem}" for problem in left_out]


def _name_roots(survey: Survey, recipe: Recipe) -> set[str]:
    """What problems call whole folders."""
    return {str(survey.folder), *(name for name in (recipe.class_data, recipe.masks) if name)}


def _locate(folders: list[Path]) -> set[tuple[int, int]]:
    """The device and number of each of the folders that is there."""
    places = set()
    for folder in folders:
        with suppress(OSError, ValueError):
            found = folder.stat()
            places.add((found.st_dev, found.st_ino))
    return places


def describe_prior(classes: Material, recipe: Recipe, processes: int = 1) -> list[str]:
    """Lines on the class pictures: how many, what a step has of them, what they count, and which the base draws."""
    examples, shown = classes.examples, sum(e.repeats for e in classes.examples)
    if not shown:
        return []
    together = recipe.images_per_step * processes
    epochs = recipe.steps * together / shown
    drawn = examples[len(examples) - classes.drawn :]
    beside = f" and {classes.drawn} drawn" if 0 < classes.drawn < len(examples) else ""
    return [
        f"{classes.folder}{beside}: {count(len(examples), 'class picture')}, {together} in each step beside yours "
        f"({epochs:.3g} epochs), their loss times {recipe.prior_weight:g}",
        *describe_drawn(recipe, drawn, len(examples) - len(drawn)),
    ]


def plan_prior(classes: Material, recipe: Recipe, side_px: int, processes: int = 1) -> list[str]:
    """All that becomes of the class pictures, as lines. Raises: as `Material.cut`."""
    own = class_recipe(recipe)
    wordings = list_wordings([e.caption for e in classes.examples], own)
    lines = classes.cut(own, side_px, processes=processes).describe(own.images_per_step * processes)
    return describe_prior(classes, recipe, processes) + lines + describe_crops(own) + describe_wordings(wordings, own)
