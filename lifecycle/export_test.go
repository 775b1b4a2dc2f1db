package lifecycle

// TestSteps declares the steps of the tests, for those outside of the package.
var TestSteps = testSteps
