# Written by docs/stub.py from the table in __init__.py.

from hnkit.backend import Backend as Backend
from hnkit.backend import BackendBase as BackendBase
from hnkit.backend import Reward as Reward
from hnkit.bounds import field_of_values_bounds as field_of_values_bounds
from hnkit.bounds import frobenius_bound as frobenius_bound
from hnkit.bounds import local_theorem7_bound as local_theorem7_bound
from hnkit.bounds import second_order_remainder_bound as second_order_remainder_bound
from hnkit.bounds import singular_value_bound as singular_value_bound
from hnkit.bounds import theorem7_bound as theorem7_bound
from hnkit.errors import ExpansiveMapError as ExpansiveMapError
from hnkit.errors import InputError as InputError
from hnkit.errors import MissingDerivativeError as MissingDerivativeError
from hnkit.errors import NonFiniteError as NonFiniteError
from hnkit.errors import NotCertifiedError as NotCertifiedError
from hnkit.frontier import Frontier as Frontier
from hnkit.frontier import gap_lower_bound as gap_lower_bound
from hnkit.frontier import nats_lower_bound as nats_lower_bound
from hnkit.internal.stats import Estimate as Estimate
from hnkit.jacobian import RowJacobian as RowJacobian
from hnkit.jacobian import check_map as check_map
from hnkit.jacobian import dense_jacobian as dense_jacobian
from hnkit.kl import KLEstimate as KLEstimate
from hnkit.kl import noise_kl as noise_kl
from hnkit.lipschitz import InjectivityCertificate as InjectivityCertificate
from hnkit.lipschitz import LipschitzEstimate as LipschitzEstimate
from hnkit.lipschitz import Scaled as Scaled
from hnkit.lipschitz import Sum as Sum
from hnkit.lipschitz import certify_injective as certify_injective
from hnkit.lipschitz import lipschitz_lower as lipschitz_lower
from hnkit.lipschitz import lipschitz_upper as lipschitz_upper
from hnkit.lipschitz import local_lipschitz as local_lipschitz
from hnkit.lipschitz import register as register
from hnkit.logdet import log_det_error as log_det_error
from hnkit.loss import LossTerms as LossTerms
from hnkit.loss import NoiseLoss as NoiseLoss
from hnkit.maps import Condition as Condition
from hnkit.maps import ConditionedMap as ConditionedMap
from hnkit.maps import NoiseMap as NoiseMap
from hnkit.tilt import TiltedProblem as TiltedProblem
from hnkit.tilt import optimality_gap as optimality_gap
from hnkit.verify import Check as Check
from hnkit.verify import Report as Report
from hnkit.verify import verify_bound as verify_bound

__version__: str
