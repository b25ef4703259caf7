from serve_stand_in import model, processes

__all__ = ["model", "processes"]
