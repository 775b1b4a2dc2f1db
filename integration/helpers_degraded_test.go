package integration

// kataTable has podfsm degraded: Kata Containers makes a sandbox of its own.
const kataTable = `
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.kata]
runtime_type = 'io.containerd.kata.v2'
sandboxer = 'podfsm'
`
