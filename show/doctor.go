package show

import (
	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
	"github.com/podfsm/podfsm/doctor"
	"github.com/podfsm/podfsm/ledger"
	"github.com/podfsm/podfsm/lifecycle"
)

// Examination returns the findings of the doctor as the API shows them.
func Examination(found []doctor.Finding) *podfsmv1.DoctorResponse {
	response := &podfsmv1.DoctorResponse{}
	for _, f := range found {
		response.Findings = append(response.Findings, &podfsmv1.Finding{
			Check:       f.Check,
			Subject:     f.Subject,
			Status:      string(f.Status),
			Evidence:    f.Evidence,
			Remedy:      f.Remedy,
			RefusedPods: string(f.Stops),
		})
	}
	return response
}

// Damaged returns the damaged files of a ledger, and those that were kept aside as damaged.
func Damaged(damage []ledger.Damage, aside []string) (damaged []doctor.Damaged) {
	reasons := map[string]string{}
	for _, d := range damage {
		switch {
		case d.Kept != "":
			reasons[d.Kept] = d.Reason
		case !d.Torn:
			damaged = append(damaged, doctor.Damaged{File: d.File, Reason: d.Reason})
		}
	}
	for _, file := range aside {
		damaged = append(damaged, doctor.Damaged{File: file, Reason: reasons[file]})
	}
	return damaged
}

// Pending counts the sandboxes with a pending cleanup.
func Pending(views []lifecycle.View) (n int) {
	for _, view := range views {
		if view.Pending() {
			n++
		}
	}
	return n
}
