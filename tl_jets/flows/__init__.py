"""Flow: what an intervention does, through every component, exactly."""

from tl_jets.flows.joint import JointFlow as JointFlow
from tl_jets.flows.joint import joint_flow as joint_flow
from tl_jets.flows.results import Flow as Flow
from tl_jets.flows.sweep import flow as flow
