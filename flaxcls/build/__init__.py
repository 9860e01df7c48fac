"""From the config tree to the Experiment: the only floor that reads the tree.

Each function raises ConfigError for the impossible, before anything slow happens.
"""

from flaxcls.build.experiment import Before as Before
from flaxcls.build.experiment import Experiment as Experiment
from flaxcls.build.experiment import before as before
from flaxcls.build.experiment import make_experiment as make_experiment
from flaxcls.build.fake import on_fake_data as on_fake_data
from flaxcls.build.length import run_length as run_length
from flaxcls.build.pieces import frozen as frozen
from flaxcls.build.pieces import learning_rate as learning_rate
from flaxcls.build.pieces import loss as loss
from flaxcls.build.pieces import mesh as mesh
from flaxcls.build.pieces import model as model
from flaxcls.build.pieces import optimizer as optimizer
from flaxcls.build.saved import SavedExperiment as SavedExperiment
from flaxcls.build.saved import saved_experiment as saved_experiment
from flaxcls.build.saved import saved_mesh as saved_mesh
from flaxcls.build.sources import check_source as check_source
from flaxcls.build.sources import source as source
from flaxcls.build.sources import source_or_description as source_or_description
from flaxcls.build.validate import check as check
