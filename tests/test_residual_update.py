import pytest
from cases import *
@each_backend
@each_precision
@each_form
def test_v(form, precision, backend):
    verify(form.of(precision), backend)
@each_backend
@each_layout
@each_form
def test_l(form, layout, backend):
    verify(replace(form, layout=layout, vector_layout="chunk", offset=3), backend)
