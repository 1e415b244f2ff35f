"""`python -m sdlora`."""

from .cli import main
from .training.processes import end

end(main())
