"""Generators whose reward-tilted law is known in closed form, to judge every other number of hnkit by."""
