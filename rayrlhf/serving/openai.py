"""The endpoint for a Serve that is there already, such as KubeRay's RayService.

    import_path: rayrlhf.serving.openai:app
    args: {recipe: /shared/recipe.yaml, overrides: [serve.replicas=2]}

The recipe and its run directory lie on a volume that every node sees. The token is that of the
variable which `serve.token_variable` names, from a secret, or the one in the run directory.
"""

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict
from ray import serve

from rayrlhf.config import RecipeError, load
from rayrlhf.serving.front import folder_of
from rayrlhf.serving.serve import TOKEN, application, model_folders
from rayrlhf.serving.sessions import load_secret


class Args(BaseModel):
    """The `args` of the application."""

    model_config = ConfigDict(extra="forbid")

    recipe: str
    """Path of the recipe."""
    overrides: Sequence[str] = ()
    """`key.sub=value`, as on the command line."""


def app(args: Args) -> serve.Application:
    """Build the endpoint; address and port are those of the cluster's Serve."""
    recipe = load(args.recipe, args.overrides)
    if recipe.serve is None:
        raise RecipeError(f"{args.recipe}: the recipe has no section serve: add one")
    variable = recipe.serve.token_variable
    recipe = recipe.model_copy(update={"run_dir": str(recipe.path.absolute())})
    folder = folder_of(recipe)
    folder.mkdir(parents=True, exist_ok=True)
    token, _ = load_secret(folder, variable, TOKEN)
    return application(recipe, model_folders(recipe), token, is_here=False)
