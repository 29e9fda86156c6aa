"""InspectionService: looking inside the transformer."""

from __future__ import annotations

from typing import Any

import grpc

from salver.server.admission import Admission
from salver.server.rpc.model_card import model_card
from salver.server.rpc.served import Front
from salver.server.rpc.validation import model_named
from salver.v1 import inspection_pb2_grpc


class InspectionService(inspection_pb2_grpc.InspectionServiceServicer):
    """What a model is made of and does inside."""

    def __init__(self, front: Front, admission: Admission) -> None:
        self._front = front
        self._admission = admission

    async def GetModelCard(self, request: Any, context: grpc.aio.ServicerContext) -> Any:
        base = self._front.model
        model = model_named(request.model, base)
        return model_card(request, model, base, self._admission.forecast.times)
