"""Flow: what an intervention does, through every component, exactly."""

from tl_jets.flows.flow import flow as flow
from tl_jets.flows.results import Flow as Flow
