//go:build linux

package plan

import (
	"fmt"
	"slices"
	"strings"
)

// schema checks documents against the keywords of JSON Schema that docs/plan.schema.json
// uses. A keyword that it does not know is a fault of the schema.
type schema struct{ root map[string]any }

func (v schema) check(s map[string]any, doc any, at string) (problems []string) {
	add := func(format string, a ...any) { problems = append(problems, at+": "+fmt.Sprintf(format, a...)) }
	for key, want := range s {
		switch key {
		case "$schema", "$id", "title", "description", "$defs", "properties", "additionalProperties":
		case "$ref":
			name := strings.TrimPrefix(want.(string), "#/$defs/")
			def, ok := v.root["$defs"].(map[string]any)[name].(map[string]any)
			if !ok {
				add("the schema refers to %s, which is not there", want)
				continue
			}
			problems = append(problems, v.check(def, doc, at)...)
		case "type":
			if got := typeOf(doc); got != want && !(want == "number" && got == "integer") {
				add("%s, not %s", got, want)
			}
		case "enum":
			if !slices.Contains(want.([]any), doc) {
				add("%v is none of %v", doc, want)
			}
		case "const":
			if doc != want {
				add("%v is not %v", doc, want)
			}
		case "minimum":
			if n, ok := doc.(float64); ok && n < want.(float64) {
				add("%v is below %v", n, want)
			}
		case "required":
			object, _ := doc.(map[string]any)
			for _, name := range want.([]any) {
				if _, ok := object[name.(string)]; !ok {
					add("%s is missing", name)
				}
			}
		case "items":
			list, _ := doc.([]any)
			for i, e := range list {
				problems = append(problems, v.check(want.(map[string]any), e, fmt.Sprintf("%s[%d]", at, i))...)
			}
		default:
			add("the schema has an unknown keyword %s", key)
		}
	}
	object, ok := doc.(map[string]any)
	if !ok {
		return problems
	}
	properties, _ := s["properties"].(map[string]any)
	for name, value := range object {
		if p, ok := properties[name].(map[string]any); ok {
			problems = append(problems, v.check(p, value, at+"."+name)...)
			continue
		}
		switch more := s["additionalProperties"].(type) {
		case bool:
			if !more {
				add("%s is not in the schema", name)
			}
		case map[string]any:
			problems = append(problems, v.check(more, value, at+"."+name)...)
		}
	}
	return problems
}

func typeOf(doc any) string {
	switch doc := doc.(type) {
	case nil:
		return "null"
	case bool:
		return "boolean"
	case string:
		return "string"
	case []any:
		return "array"
	case float64:
		if doc == float64(int64(doc)) {
			return "integer"
		}
		return "number"
	}
	return "object"
}
