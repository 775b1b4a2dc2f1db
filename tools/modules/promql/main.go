// Command promql parses PromQL with the code of Prometheus, for the tests of the dashboard and the
// alerts. It is a separate module, because of the dependencies of Prometheus.
//
//	promql RULES.yaml < EXPRESSIONS.json
//
// RULES.yaml has alerting rules, and EXPRESSIONS.json is an object of further expressions by their
// places. promql writes the parsed expressions as JSON to stdout. It fails on what Prometheus would
// refuse.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"

	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/rulefmt"
	"github.com/prometheus/prometheus/promql/parser"
)

// Expression is a parsed expression.
type Expression struct {
	Where    string
	Vectors  []Vector
	Grouping []string // the labels for grouping or matching
}

// Vector is a metric and the matchers of its labels.
type Vector struct {
	Metric   string
	Matchers []Matcher
}

// Matcher is one of =, !=, =~ and !~ on a label.
type Matcher struct{ Label, Op, Value string }

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "promql:", err)
		os.Exit(1)
	}
}

func run() error {
	p := parser.NewParser(parser.Options{})
	groups, errs := rulefmt.ParseFile(os.Args[1], false, model.UTF8Validation, p, slog.Default())
	if err := errors.Join(errs...); err != nil {
		return err
	}
	texts := map[string]string{}
	if err := json.NewDecoder(os.Stdin).Decode(&texts); err != nil {
		return fmt.Errorf("failed to read the expressions: %w", err)
	}
	for _, group := range groups.Groups {
		for _, rule := range group.Rules {
			texts["alert "+rule.Alert] = rule.Expr
		}
	}
	var all []Expression
	for where, text := range texts {
		parsed, err := p.ParseExpr(text)
		if err != nil {
			return fmt.Errorf("%s: %q: %w", where, text, err)
		}
		all = append(all, read(where, parsed))
	}
	return json.NewEncoder(os.Stdout).Encode(all)
}

func read(where string, parsed parser.Expr) Expression {
	e := Expression{Where: where}
	parser.Inspect(parsed, func(node parser.Node, _ []parser.Node) error {
		switch node := node.(type) {
		case *parser.VectorSelector:
			v := Vector{Metric: node.Name}
			for _, m := range node.LabelMatchers {
				if m.Name != model.MetricNameLabel {
					v.Matchers = append(v.Matchers, Matcher{m.Name, m.Type.String(), m.Value})
				}
			}
			e.Vectors = append(e.Vectors, v)
		case *parser.AggregateExpr:
			e.Grouping = append(e.Grouping, node.Grouping...)
		case *parser.BinaryExpr:
			if node.VectorMatching != nil {
				e.Grouping = append(append(e.Grouping, node.VectorMatching.MatchingLabels...), node.VectorMatching.Include...)
			}
		}
		return nil
	})
	return e
}
