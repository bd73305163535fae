"""The only package that imports ray: worker actors and the executor that keeps them alive."""
