package cli

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"reflect"
	"strings"
	"text/template"
	"unicode/utf8"
)

// A row is a value whose exported methods without arguments give the fields that a
// --format template can name. Methods returning string also make its JSON form.

// list describes how a kind of rows is shown.
type list struct {
	// table is the default template without the word "table": {{.ID}}\t{{.Names}}.
	table string
	// headers name the columns by field.
	headers map[string]string
	// quiet is the field that -q prints.
	quiet string
	// whole leaves the table as wide as it is (--no-trunc).
	whole bool
}

const formatHelp = `"table", "json", or a Go template such as '{{.ID}}' or 'table {{.ID}}\t{{.Names}}'`

var templateFuncs = template.FuncMap{
	"json":  func(v any) (string, error) { return jsonString(v) },
	"upper": strings.ToUpper,
	"lower": strings.ToLower,
	"title": func(s string) string {
		if s == "" {
			return s
		}
		return strings.ToUpper(s[:1]) + s[1:]
	},
	"split": strings.Split,
	"join":  func(s []string, sep string) string { return strings.Join(s, sep) },
	"println": func(v ...any) string {
		return fmt.Sprintln(v...)
	},
	"pad": func(s string, before, after int) string {
		if s == "" {
			return s
		}
		return strings.Repeat(" ", before) + s + strings.Repeat(" ", after)
	},
	"truncate": func(s string, n int) string {
		if utf8.RuneCountInString(s) <= n {
			return s
		}
		return string([]rune(s)[:n])
	},
}

func jsonString(v any) (string, error) {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(v); err != nil {
		return "", err
	}
	return strings.TrimSpace(b.String()), nil
}

func parseTemplate(format string) (*template.Template, error) {
	format = strings.NewReplacer(`\t`, "\t", `\n`, "\n").Replace(format)
	t, err := template.New("format").Funcs(templateFuncs).Option("missingkey=error").Parse(format)
	if err != nil {
		return nil, &exitError{exitUsage, fmt.Sprintf("bad --format template: %s", strings.TrimPrefix(err.Error(), "template: format:"))}
	}
	return t, nil
}

// print writes rows in the format that the user chose.
func (l list) print(w io.Writer, rows []any, format string, quiet bool) error {
	if quiet && (format == "" || format == "table") {
		format = "{{." + l.quiet + "}}"
	}
	switch {
	case format == "" || format == "table":
		return l.printTable(w, rows, l.table)
	case strings.HasPrefix(format, "table "):
		return l.printTable(w, rows, strings.TrimPrefix(format, "table "))
	case format == "json":
		for _, r := range rows {
			s, err := jsonString(fields(r))
			if err != nil {
				return err
			}
			fmt.Fprintln(w, s)
		}
		return nil
	}
	t, err := parseTemplate(format)
	if err != nil {
		return err
	}
	for _, r := range rows {
		var b bytes.Buffer
		if err := t.Execute(&b, r); err != nil {
			return &exitError{exitUsage, fmt.Sprintf("bad --format template: %s. Fields: %s", templateCause(err), strings.Join(fieldNames(r), ", "))}
		}
		fmt.Fprintln(w, b.String())
	}
	return nil
}

func templateCause(err error) string {
	msg := err.Error()
	if i := strings.LastIndex(msg, ": "); i >= 0 {
		return msg[i+2:]
	}
	return msg
}

func (l list) printTable(w io.Writer, rows []any, format string) error {
	t, err := parseTemplate(format)
	if err != nil {
		return err
	}
	var lines [][]string
	head := map[string]string{}
	for k, v := range l.headers {
		head[k] = v
	}
	var b bytes.Buffer
	if err := t.Option("missingkey=zero").Execute(&b, head); err == nil {
		lines = append(lines, strings.Split(b.String(), "\t"))
	}
	for _, r := range rows {
		b.Reset()
		if err := t.Execute(&b, r); err != nil {
			return &exitError{exitUsage, fmt.Sprintf("bad --format template: %s. Fields: %s", templateCause(err), strings.Join(fieldNames(r), ", "))}
		}
		lines = append(lines, strings.Split(b.String(), "\t"))
	}
	limit := width(w)
	if l.whole {
		limit = 0
	}
	_, err = io.WriteString(w, layout(lines, limit))
	return err
}

const columnGap = 3

// copied tells of a column, by its header, whether people copy what stands in it.
func copied(header string) bool {
	for _, end := range []string{"ID", "NAME", "NAMES", "REPOSITORY", "TAG", "DIGEST"} {
		if header == end || strings.HasSuffix(header, " "+end) {
			return true
		}
	}
	return false
}

// layout pads columns. Where they exceed the terminal, the widest ones are cut until the table
// fits, but for what people copy, which is of no use when it is cut; limit 0 means no limit.
func layout(lines [][]string, limit int) string {
	var widths []int
	for _, line := range lines {
		for i, cell := range line {
			if i == len(widths) {
				widths = append(widths, 0)
			}
			widths[i] = max(widths[i], utf8.RuneCountInString(cell))
		}
	}
	const least = 10
	if limit > 0 {
		total := columnGap * (len(widths) - 1)
		for _, n := range widths {
			total += n
		}
		for total > limit {
			widest := -1
			for i := range widths {
				if !copied(lines[0][min(i, len(lines[0])-1)]) && (widest < 0 || widths[i] > widths[widest]) {
					widest = i
				}
			}
			if widest < 0 || widths[widest] <= least {
				break
			}
			widths[widest]--
			total--
		}
	}
	var b strings.Builder
	for _, line := range lines {
		for i, cell := range line {
			n := utf8.RuneCountInString(cell)
			if n > widths[i] {
				cell = string([]rune(cell)[:widths[i]-1]) + "…"
				n = widths[i]
			}
			b.WriteString(cell)
			if i < len(line)-1 {
				b.WriteString(strings.Repeat(" ", widths[i]-n+columnGap))
			}
		}
		b.WriteByte('\n')
	}
	return b.String()
}

// fields gives a row's string fields for its JSON form.
func fields(row any) map[string]string {
	v := reflect.ValueOf(row)
	out := map[string]string{}
	for i := range v.NumMethod() {
		m := v.Method(i).Type()
		if m.NumIn() == 0 && m.NumOut() == 1 && m.Out(0).Kind() == reflect.String {
			out[v.Type().Method(i).Name] = v.Method(i).Call(nil)[0].String()
		}
	}
	return out
}

func fieldNames(row any) []string {
	t := reflect.TypeOf(row)
	var out []string
	for i := range t.NumMethod() {
		out = append(out, "."+t.Method(i).Name)
	}
	return out
}

// inspectPrint writes whole objects: indented JSON, or one template result a line.
func inspectPrint(w io.Writer, objects []any, format string) error {
	if format == "" || format == "json" {
		indent := "    "
		if format == "json" {
			indent = ""
		}
		var b bytes.Buffer
		enc := json.NewEncoder(&b)
		enc.SetEscapeHTML(false)
		enc.SetIndent("", indent)
		if objects == nil {
			objects = []any{}
		}
		if err := enc.Encode(objects); err != nil {
			return err
		}
		_, err := w.Write(b.Bytes())
		return err
	}
	t, err := parseTemplate(format)
	if err != nil {
		return err
	}
	for _, o := range objects {
		var b bytes.Buffer
		if err := t.Execute(&b, o); err != nil {
			b.Reset()
			if t.Execute(&b, jsonForm(o)) != nil {
				return &exitError{exitUsage, "bad --format template: " + templateCause(err)}
			}
		}
		fmt.Fprintln(w, b.String())
	}
	return nil
}

// jsonForm is an object with the names that the API gives its fields, {{.Id}} and not
// {{.ID}}, as docker's templates may use either. Numbers stay as they were written.
func jsonForm(o any) any {
	raw, err := json.Marshal(o)
	if err != nil {
		return nil
	}
	d := json.NewDecoder(bytes.NewReader(raw))
	d.UseNumber()
	var v any
	if d.Decode(&v) != nil {
		return nil
	}
	return v
}
